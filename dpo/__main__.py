"""``python -m ppo_vs_dpo.dpo RUN [--point beta=0.3]``: a run folder's DPO policy, or a point of its sweep."""

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import stage_main

with libraries():
    from ppo_vs_dpo.dpo.train import run_stage

if __name__ == "__main__":
    stage_main("dpo", run_stage)
