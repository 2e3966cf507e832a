"""Papers on DPO and on DPO against PPO."""
