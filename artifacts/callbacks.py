"""A transformers callback that keeps the run folder up to date while a Trainer works."""

import json

from transformers import TrainerCallback

from ppo_vs_dpo.artifacts.files import finite, read_jsonl, write_jsonl
from ppo_vs_dpo.artifacts.resources import parameters_without_embeddings
from ppo_vs_dpo.artifacts.stage import StageContext


class RunCallback(TrainerCallback):
    """Writes ``metrics.jsonl`` (a line for each log, with its step) and the progress that the overview shows.

    After a resume the lines past the checkpoint's step are dropped first, so that the file has each step once.
    """

    def __init__(self, context: StageContext):
        self.context = context
        self.path = context.dir / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_jsonl(self.path) if row["step"] <= state.global_step] if self.path.exists() else []
        self.rows = kept
        write_jsonl(self.path, kept)

    def on_step_end(self, args, state, control, **kwargs):
        self.context.progress(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite({"step": state.global_step, **logs})) + "\n")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        # Both are kept with every checkpoint, so that a resumed run has counted all of it. TRL counts real tokens;
        # the Trainer's own total_flos counts padding too, which these stages skip.
        tokens = next((row["num_tokens"] for row in reversed(state.log_history) if "num_tokens" in row), None)
        flops = state.total_flos if tokens is None else 6 * tokens * parameters_without_embeddings(model)
        self.context.count(flops=flops)
