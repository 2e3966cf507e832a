"""vLLM as an engine: in the trainer's processes, or as a server that gets the weights."""
