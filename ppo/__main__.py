"""``python -m ppo RUN [--point kl_coef=0.0]``"""

from artifacts.stage import stage_main
from ppo.train import run_stage

if __name__ == "__main__":
    stage_main("ppo", run_stage)
