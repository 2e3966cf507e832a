"""A transformers callback that keeps the run folder up to date while a Trainer works."""

import json
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ppo_vs_dpo.artifacts.files import finite, write_jsonl
from ppo_vs_dpo.artifacts.guards.checkpoints import stamp
from ppo_vs_dpo.artifacts.resources import parameters_without_embeddings
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.sharding.collectives import barrier


class RunCallback(TrainerCallback):
    """Writes ``metrics.jsonl`` (a line for each log, with its step) and the progress that the overview shows.

    After a resume the file begins with the lines that the checkpoint knows of: it is that of an undisturbed run. Each
    checkpoint gets its stamp (`guards.checkpoints`), and then those beyond ``save_total_limit`` are deleted.
    """

    def __init__(self, context: StageContext):
        self.context = context
        self.path = context.dir / "metrics.jsonl"
        self.stepped = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        write_jsonl(self.path, [{"step": row["step"], **row} for row in state.log_history])

    def on_step_end(self, args, state, control, **kwargs):
        self.stepped = True
        self.context.progress(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite({"step": state.global_step, **logs})) + "\n")

    def on_save(self, args, state, control, **kwargs):
        barrier()  # every rank's files are there
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            stamp(folder, self.context.fingerprint, resumable=not args.save_only_model)
            # Not before: of one checkpoint that is kept the older would be gone, and the newer not fit yet.
            rotate_checkpoints(
                args.output_dir, args.save_total_limit, best_model_checkpoint=state.best_model_checkpoint
            )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        # Both are kept with every checkpoint, so that a resumed run has counted all of it. TRL counts real tokens;
        # the Trainer's own total_flos counts padding too, which these stages skip.
        tokens = next((row["num_tokens"] for row in reversed(state.log_history) if "num_tokens" in row), None)
        flops = state.total_flos if tokens is None else 6 * tokens * parameters_without_embeddings(model)
        self.context.count(flops=flops)
