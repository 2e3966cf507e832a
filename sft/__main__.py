"""``python -m ppo_vs_dpo.sft RUN``: train the reference policy of a run folder."""

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import stage_main

with libraries():
    from ppo_vs_dpo.sft.train import run_stage

if __name__ == "__main__":
    stage_main("sft", run_stage)
