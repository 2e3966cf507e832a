"""What the recipes that make new pairs share."""
