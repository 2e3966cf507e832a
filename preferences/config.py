"""The ``data`` section of the configuration: one dataclass for each kind of source."""

from dataclasses import dataclass, field, fields, make_dataclass
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


@dataclass
class GivenPairs:
    """Pairs that are there: on the Hub, in files, or in the configuration itself.

    Attributes:
        source: ``pairs``.
        path: a Hub name, a file (``.jsonl``, ``.json``, ``.parquet``, ``.csv``; ``.gz`` too) or a folder of files.
        inline: in place of ``path``: the pairs themselves, ``{prompt: [...], chosen: [...], rejected: [...]}``.
        format: ``auto`` or a name in `preferences.mappings.MAPPINGS`.
        columns: schema name -> the source's name, for ``format: pairs``.
        split: the Hub's split to train on.
        subset: the Hub's configuration.
        revision: the Hub's branch, tag or commit.
        streaming: read from the Hub without keeping a copy.
        test_path: a file with test pairs; else a share of the prompts is kept for them.
        test_split: the Hub's split with test pairs.
        prompts_path: further prompts for PPO: a file with a column ``prompt`` or ``messages``.
        conversational: make messages of texts (true) or texts of messages (false); null: as they are.
        min_score_ratio: SHP: least ratio of the two comments' votes.
        dimension: PKU-SafeRLHF: ``helpful`` or ``safe``.
        drop_both_unsafe: PKU-SafeRLHF: leave out pairs without a safe response.
        drop_both_safe: PKU-SafeRLHF: leave out pairs without an unsafe response.
        max_pairs: stop reading after so many usable pairs.
        test_fraction: share of the prompts whose pairs are for testing, where there is no test split.
        heldout_fraction: share of the prompts that ``compare`` judges on and that no pair set holds.
        heldout_prompts: at most so many of them.
        max_prompt_tokens: longer prompts count as truncated; null: no limit.
        max_response_tokens: longer responses count as truncated; null: no limit.
        sft: ``chosen`` makes SFT examples of the preferred responses (Preferred-FT); ``none`` makes none.
        gold: a known reward to judge by, ``package.module:function``, or null.
        on_problem: kind of problem -> ``error``, ``drop`` or ``keep``, over the defaults of the validation.
    """

    source: str = "pairs"
    path: str | None = None
    inline: dict[str, list[Any]] | None = None
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    test_path: str | None = None
    test_split: str | None = None
    prompts_path: str | None = None
    conversational: bool | None = None
    min_score_ratio: float = 0.0
    dimension: str = "helpful"
    drop_both_unsafe: bool = False
    drop_both_safe: bool = False
    max_pairs: int | None = None
    test_fraction: float = 0.1
    heldout_fraction: float = 0.1
    heldout_prompts: int = 512
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    sft: str = "chosen"
    gold: str | None = None
    on_problem: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if (self.path is None) == (self.inline is None):
            raise UserError("data.path or data.inline: exactly one of them is needed.")
        for name in ("test_fraction", "heldout_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least 0 and less than 1.")
        if self.sft not in ("chosen", "none"):
            raise UserError(f"data.sft is {self.sft!r}; it must be chosen or none.")
        if self.test_path is not None and self.test_split is not None:
            raise UserError("data.test_path and data.test_split: at most one of them.")


SOURCES: dict[str, type] = {"testbed": ReviewTestbed, "pairs": GivenPairs}
# Where each source's two steps are.
_STEPS = {
    "testbed": {"data": "preferences.testbed.world", "pairs": "preferences.testbed.pairs"},
    "pairs": {"data": "preferences.given", "pairs": "preferences.given"},
}

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
