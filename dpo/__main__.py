"""``python -m dpo RUN [--point beta=0.3]``: train the DPO policy of a run folder, or a point of its sweep."""

from artifacts.stage import stage_main
from dpo.train import run_stage

if __name__ == "__main__":
    stage_main("dpo", run_stage)
