"""Papers whose recipe is what people reproduce."""
