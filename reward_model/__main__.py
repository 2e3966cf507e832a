"""``python -m reward_model RUN``: train and report on the reward model of a run folder."""

from artifacts.stage import stage_main
from reward_model.train import run_stage

if __name__ == "__main__":
    stage_main("reward_model", run_stage)
