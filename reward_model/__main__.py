"""``python -m ppo_vs_dpo.reward_model RUN``: train and report on the reward model of a run folder."""

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import stage_main

with libraries():
    from ppo_vs_dpo.reward_model.train import run_stage

if __name__ == "__main__":
    stage_main("reward_model", run_stage)
