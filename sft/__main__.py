"""``python -m sft RUN``: train the reference policy of a run folder."""

from artifacts.stage import stage_main
from sft.train import run_stage

if __name__ == "__main__":
    stage_main("sft", run_stage)
