"""Compare all policies of a run on held-out prompts: ``python -m ppo_vs_dpo.compare RUN``."""

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import stage_main

with libraries():
    from ppo_vs_dpo.compare.stage import run_compare

if __name__ == "__main__":
    stage_main("compare", run_compare)
