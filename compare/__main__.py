"""Compare all policies of a run on held-out prompts: ``python -m compare RUN``."""

from artifacts.stage import stage_main
from compare.stage import run_compare

if __name__ == "__main__":
    stage_main("compare", run_compare)
