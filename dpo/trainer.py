"""TRL's ``DPOTrainer`` with reference log-probabilities kept between runs, soft labels, and no padding."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging
from trl.trainer.dpo_trainer import DPOTrainer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_parquet, sha256_of, write_parquet
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.dpo.data import COLUMNS, UNREAD, PairCollator
from ppo_vs_dpo.dpo.order import trained_rows
from ppo_vs_dpo.models.passes.unpadded import skip_padding
from ppo_vs_dpo.models.sharding.collectives import of_first
from ppo_vs_dpo.models.text.encoding import MASKS

logger = logging.get_logger(__name__)

# Under this name the trainer notes how many pairs each batch had.
PAIRS = "pairs"
# Counted up when a pass rounds otherwise: what was kept before is not read.
ARITHMETIC = 2
REFERENCE_COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]


def kept_whole(path: Path, rows: int) -> bool:
    """Whether log-probabilities of so many pairs are kept there; what cannot be read is computed again."""
    try:
        return path.is_file() and len(read_parquet(path, REFERENCE_COLUMNS)) == rows
    except UserError:
        return False


class PairTrainer(DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) on pairs that are token ids already.

    With ``precompute_ref_log_probs`` the reference's log-probabilities, the same for every beta, are kept in a file:
    the runs of a sweep compute them once. Of training pairs it reads those that the run will draw (`dpo.order`); the
    others have NaN, and a step that draws one stops.

    Args:
        reference_cache: folder for them; ``None`` keeps none.
        reference_id: whose they are (a hash of the reference model's files).
        starts_from_reference: the policy is the reference at first, and a run in which it is not stops.
        progress: called with the pairs that the reference has read beforehand, and how many there are.
        kwargs: of ``trl.DPOTrainer``.
    """

    def __init__(
        self,
        *args,
        reference_cache: Path | None = None,
        reference_id: str = "",
        starts_from_reference: bool = True,
        progress: Callable[[int, int], None] | None = None,
        **kwargs,
    ):
        self.reference_cache, self.reference_id = reference_cache, reference_id
        self.progress, self._read, self._to_read = progress, 0, 0
        # Share of the training pairs that the reference reads beforehand.
        self.share_read = 1.0
        self.starts_from_reference, self._checked_start = starts_from_reference, False
        # Said once, where the reference is another model: for the run's warnings.
        self.start_note: str | None = None
        super().__init__(*args, **kwargs)
        self.data_collator = PairCollator(**vars(self.data_collator))
        skip_padding(self.accelerator.unwrap_model(self.model), pairs=True)
        if self.ref_model is not None:
            skip_padding(self.accelerator.unwrap_model(self.ref_model), pairs=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss; the number of pairs is noted beside the metrics that TRL takes of each batch.

        With soft labels it is the cross-entropy to p, the probability that chosen is better. With d the difference of
        the two log-ratios, -p log sigma(beta d) - (1 - p) log sigma(-beta d) = -log sigma(beta d) + (1 - p) beta d:
        DPO's loss and a linear term. One p for all pairs is conservative DPO with 1 - p for the smoothing.
        """
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][PAIRS].append(len(inputs["input_ids"]) // 2)
        inputs = dict(inputs)
        labels = inputs.pop("soft_label", None)
        if inputs.pop(UNREAD, False):
            raise UserError(
                f"step {self.state.global_step + 1} draws pairs that the reference has not read: the trainer was made "
                f"for other steps or another order (max_steps={self.args.max_steps}, per_device_train_batch_size, "
                f"data_seed). Make it anew after a change of these."
            )
        if labels is None:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._check_start(inputs)
            return result
        passes = []

        def noted(**kwargs):
            passes.append(model(**kwargs))
            return passes[-1]

        result = super().compute_loss(noted, inputs, return_outputs, num_items_in_batch)
        length = inputs["completion_mask"].shape[1] - 1
        chosen, rejected = passes[0].log_probs[:, -length:].sum(1).chunk(2)
        difference = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        self._check_start(inputs)
        term = ((1 - labels) * self.beta * difference).mean()
        return (result[0] + term, result[1]) if return_outputs else result + term

    def _check_start(self, inputs: dict) -> None:
        """Before the first step the policy is its reference: both log-ratios are 0, and the loss is log 2.

        A reference of its own may be another model on purpose; then the distance is said.

        Raises:
            UserError: they are further from it than rounding, and the reference is where the policy starts.
        """
        if self._checked_start or not self.model.training:
            return
        self._checked_start = True
        dropout = any(isinstance(m, torch.nn.Dropout) and m.p for m in self.model.modules())
        if self.state.global_step or dropout:
            return
        found = [self._metrics["train"].get(f"rewards/{side}") for side in ("chosen", "rejected")]
        apart = max((abs(values[-1]) for values in found if values), default=0.0) / self.beta
        dtype = torch.bfloat16 if self.args.bf16 or self.args.fp16 else self.model.dtype
        allowed = (1e-4 if dtype in (torch.float32, torch.float64) else 2e-2) * (
            10 + inputs["completion_mask"].sum(1).max().item()
        )
        if apart <= allowed:
            return
        if not self.starts_from_reference:
            self.start_note = (
                f"the reference is another model than the policy starts from: before the first step their "
                f"log-probabilities of a completion differ by up to {apart:.2g} nats on average of a batch (rounding: "
                f"{allowed:.2g}), and the first loss is not log 2. If the policy itself was meant, leave it out."
            )
            logger.warning(self.start_note)
        else:
            raise UserError(
                f"before the first step the policy's log-probabilities of a completion are {apart:.2g} nats from the "
                f"reference's (rounding: {allowed:.2g}), and the policy starts from the reference: the loss should be "
                f"log 2. Usual causes: adapters that rewrite the base or come trained (the reference is then not the "
                f"model that was given; pass it as reference), dropout that is still on, or log-probabilities kept "
                f"for another model (delete pairs/reference_logprobs)."
            )

    def compute_ref_log_probs(self, model, inputs):
        """Of a batch whose labels the reference does not need."""
        if self._to_read and self.progress is not None:
            self._read += len(inputs["input_ids"]) // 2 * self.accelerator.num_processes
            self.progress(min(self._read, self._to_read), self._to_read)
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "soft_label"})

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        more = [name for name in ("soft_label", *MASKS) if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *more]

    def log(self, logs, start_time=None):
        """Average over pairs. TRL averages over batches, and the last of an evaluation is smaller than the others."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        pairs = metrics.pop(PAIRS, [])
        for name, values in metrics.items():
            if len(values) == len(pairs):
                metrics[name] = [float(np.average(values, weights=pairs))]
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Token ids are taken as they are (`dpo.data`); texts go TRL's way."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    @part("scoring")
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        skip_padding(self.accelerator.unwrap_model(self.ref_model or self.model), pairs=True)
        rows = trained_rows(self, dataset) if name == "train" else None
        some = dataset if rows is None else dataset.select(rows)
        if name == "train":
            self.share_read = len(some) / len(dataset)
        self._read, self._to_read = 0, len(some)
        try:
            read = self._reference_of(some, name, batch_size)
        finally:
            self._to_read = 0
        if rows is None:
            return read
        values = {}
        for column in REFERENCE_COLUMNS:
            values[column] = np.full(len(dataset), np.nan, dtype=read.features[column].dtype)
            values[column][rows] = read[column][:]
        return concatenate_datasets([dataset, Dataset.from_dict(values)], axis=1)

    def _reference_of(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.reference_cache is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        path = self.reference_cache / f"{self._reference_key(dataset, batch_size)}.parquet"
        # All ranks must go the same way, also where one of them is late and the file is there by then.
        if of_first(kept_whole(path, len(dataset))):
            return concatenate_datasets([dataset, read_parquet(path, REFERENCE_COLUMNS)], axis=1)
        known = {file["filename"] for file in dataset.cache_files}
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        if self.accelerator.is_main_process:
            write_parquet(path, {column: dataset[column][:] for column in REFERENCE_COLUMNS})
        self.accelerator.wait_for_everyone()
        # TRL's own copy lies beside mapped data, under a name that says less than ours; it is mapped while in use.
        for file in {file["filename"] for file in dataset.cache_files} - known:
            Path(file).unlink(missing_ok=True)
        return dataset

    def _reference_key(self, dataset: Dataset, batch_size: int) -> str:
        """Everything the values depend on, the last digit included: model, arithmetic, batches, and the tokens."""
        digest = hashlib.sha256()
        masks = [name for name in MASKS if name in dataset.column_names]
        for some in dataset.select_columns([*COLUMNS, *masks]).iter(batch_size=1_000):
            for rows in ([row or [] for row in rows] for rows in some.values()):
                digest.update(np.array([len(row) for row in rows]).tobytes())
                digest.update(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64).tobytes())
        model = self.ref_model or self.model
        settings = [ARITHMETIC, self.reference_id, str(model.dtype), self.args.bf16, self.args.fp16]
        settings += [
            self.args.ld_alpha,
            self.args.max_length,
            batch_size,
            self.accelerator.num_processes,
            type(model).__name__,
        ]
        return sha256_of([settings, digest.hexdigest()])[:24]
