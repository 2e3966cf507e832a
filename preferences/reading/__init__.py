"""From files and the Hub to checked pairs and prompts, and to tables."""
