"""Which pairs a run of a few steps trains on: what the reference needs to have read, and no more."""

import itertools

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from transformers import Trainer


def trained_rows(trainer: Trainer, dataset: Dataset) -> list[int] | None:
    """The rows, ascending, that ``max_steps`` steps draw from ``dataset``; ``None`` where these are all, or nobody can
    say before the first step.

    A step takes the next rows of one order, whatever the number of ranks. The order is accelerate's
    (``SeedableRandomSampler``, by the seed of the data); where the arguments name no such seed, today's is noted, so
    that training draws by the same.
    """
    args, loading = trainer.args, trainer.accelerator.dataloader_config
    wanted = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0 or wanted >= len(dataset):
        return None
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy == "sequential":
        return list(range(wanted))
    if strategy != "random" or not loading.use_seedable_sampler:
        return None
    sampler = SeedableRandomSampler(range(len(dataset)), data_seed=loading.data_seed)
    loading.data_seed = sampler.initial_seed
    return sorted(itertools.islice(sampler, wanted))
