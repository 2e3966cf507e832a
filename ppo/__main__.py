"""``python -m ppo_vs_dpo.ppo RUN [--point kl_coef=0.0]``"""

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import stage_main

with libraries():
    from ppo_vs_dpo.ppo.stage.train import run_stage

if __name__ == "__main__":
    stage_main("ppo", run_stage)
