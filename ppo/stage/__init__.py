"""PPO as a stage of the pipeline: its keys, its models, its command."""
