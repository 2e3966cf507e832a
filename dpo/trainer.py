"""TRL's ``DPOTrainer`` with two things added: reference log-probabilities kept between runs, and no padding."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from trl.trainer.dpo_trainer import DPOTrainer

from artifacts.files import read_parquet, sha256_of, write_parquet
from models.unpadded import skip_padding

# Under this name the trainer notes how many pairs each batch had.
PAIRS = "pairs"
REFERENCE_COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]


class PairTrainer(DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) on pairs that are token ids already.

    With ``precompute_ref_log_probs`` the reference's log-probabilities, the same for every beta and seed, are kept in
    a file: the runs of a sweep compute them once.

    Args:
        reference_cache: folder for them; ``None`` keeps none.
        reference_id: whose they are (a hash of the reference model's files).
        kwargs: of ``trl.DPOTrainer``.
    """

    def __init__(self, *args, reference_cache: Path | None = None, reference_id: str = "", **kwargs):
        self.reference_cache, self.reference_id = reference_cache, reference_id
        super().__init__(*args, **kwargs)
        skip_padding(self.accelerator.unwrap_model(self.model))
        if self.ref_model is not None:
            skip_padding(self.accelerator.unwrap_model(self.ref_model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss; the number of pairs is noted beside the metrics that TRL takes of each batch."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][PAIRS].append(len(inputs["input_ids"]) // 2)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

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

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        skip_padding(self.accelerator.unwrap_model(self.ref_model or self.model))
        if self.reference_cache is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        path = self.reference_cache / f"{self._reference_key(dataset, batch_size)}.parquet"
        # All ranks must go the same way, also where one of them is late and the file is there by then.
        found = [path.is_file()]
        broadcast_object_list(found, from_process=0)
        if found[0]:
            return concatenate_datasets([dataset, read_parquet(path, REFERENCE_COLUMNS)], axis=1)
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        if self.accelerator.is_main_process:
            write_parquet(path, {column: dataset[column][:] for column in REFERENCE_COLUMNS})
        self.accelerator.wait_for_everyone()
        return dataset

    def _reference_key(self, dataset: Dataset, batch_size: int) -> str:
        """Everything the values depend on, the last digit included: model, arithmetic, batches, and the tokens."""
        digest = hashlib.sha256()
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            rows = dataset[column][:]
            digest.update(np.array([len(row) for row in rows]).tobytes())
            digest.update(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64).tobytes())
        model = self.ref_model or self.model
        settings = [self.reference_id, str(model.dtype), self.args.bf16, self.args.fp16, self.args.ld_alpha]
        settings += [self.args.max_length, batch_size, self.accelerator.num_processes, type(model).__name__]
        return sha256_of([settings, digest.hexdigest()])[:24]
