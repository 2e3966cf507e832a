"""The ``data`` section of the configuration: one dataclass for each kind of source."""

from dataclasses import dataclass, fields, make_dataclass
from typing import Any

from artifacts.errors import UserError
from artifacts.settings import nearest, split


@dataclass
class ReviewTestbed:
    """The controlled testbed: reviews from a grammar, pairs from two samples of the SFT policy, labels from gold.

    Attributes:
        source: ``testbed``.
        gold: the gold reward, ``package.module:function``.
        sft_examples: reviews that the SFT policy learns from.
        train_prompts: prompts that PPO draws from.
        heldout_prompts: prompts that ``compare`` uses and no training split holds.
        pairs: training pairs (two samples each); prompts are used again where there are more pairs than prompts.
        test_pairs: held-out pairs, on prompts of their own.
        max_new_tokens: budget of a sample, end of sequence included.
        temperature: of the samples.
        generation_batch_size: samples drawn at once.
    """

    source: str = "testbed"
    gold: str = "preferences.testbed.gold:gold_reward"
    sft_examples: int = 12_000
    train_prompts: int = 6_000
    heldout_prompts: int = 1_024
    pairs: int = 6_000
    test_pairs: int = 2_000
    max_new_tokens: int = 36
    temperature: float = 1.0
    generation_batch_size: int = 512

    def __post_init__(self):
        for name in ("sft_examples", "train_prompts", "heldout_prompts", "pairs", "test_pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")


SOURCES: dict[str, type] = {"testbed": ReviewTestbed}
# Where each source's two steps are.
_STEPS = {"testbed": {"data": "preferences.testbed.world", "pairs": "preferences.testbed.pairs"}}

# Every key that any source has: what the root configuration may hold before the source is looked at.
DataConfig = make_dataclass(
    "DataConfig",
    {item.name: (item.name, item.type, item) for cls in SOURCES.values() for item in fields(cls)}.values(),
)


def data_class(section: dict[str, Any]) -> type:
    """The dataclass that ``data.source`` names.

    Raises:
        UserError: no source, or one that does not exist.
    """
    source = section.get("source")
    if source not in SOURCES:
        hint = nearest(str(source), list(SOURCES))
        raise UserError(f"data.source is {source!r}; it must be one of {', '.join(SOURCES)}.{hint}")
    return SOURCES[source]


def data_settings(section: dict[str, Any]) -> Any:
    """The typed settings of a ``data`` section.

    Raises:
        UserError: unknown source, unknown or missing keys, wrong types; all at once.
    """
    return split(section, data_class(section), where="data")[0]


def step_module(source: str, step: str) -> str:
    """The module with ``data_step`` or ``pairs_step`` of a source."""
    return _STEPS[source][step]
