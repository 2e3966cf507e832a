"""The ``data`` section of the configuration: one dataclass for each kind of source.

Each key has its comment in ``configs/data``, in the file of its source.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest, split


@dataclass
class ReviewTestbed:
    """The controlled testbed: reviews from a grammar, pairs from two samples of the SFT policy, labels from gold."""

    source: str = "testbed"
    gold: str = "ppo_vs_dpo.preferences.testbed.gold:gold_reward"
    sft_examples: int = 12_000
    train_prompts: int = 6_000
    heldout_prompts: int = 1_024
    pairs: int = 6_000
    test_pairs: int = 2_000
    max_new_tokens: int = 36
    temperature: float = 1.0
    generation_batch_size: int = 512


@dataclass
class GivenPairs:
    """Pairs that are there: on the Hub, in files, or in the configuration itself."""

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
    rendered: bool = False
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
    sft_path: str | None = None
    gold: str | None = None
    on_problem: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if (self.path is None) == (self.inline is None):
            raise UserError("data.path or data.inline: exactly one of them is needed.")
        if self.rendered and self.conversational is not None:
            raise UserError("data.rendered and data.conversational: rendered text is neither of the two; give one.")
        if self.sft not in ("chosen", "none"):
            raise UserError(f"data.sft is {self.sft!r}; it must be chosen or none.")
        if self.test_path is not None and self.test_split is not None:
            raise UserError("data.test_path and data.test_split: at most one of them.")


@dataclass
class MadePairs:
    """Where the prompts come from when the pairs are made from them; the base of the sources that make pairs."""

    source: str = "rejection"
    prompts_path: str = "testbed"
    split: str = "train"
    conversational: bool | None = None
    prefix_words: list[int] = field(default_factory=list)
    train_prompts: int = 1_000
    test_prompts: int = 200
    heldout_prompts: int = 512
    sft_examples: int = 12_000
    gold: str | None = None
    max_new_tokens: int = 36
    temperature: float = 1.0
    top_p: float = 1.0
    generation_batch_size: int = 512

    def __post_init__(self):
        if self.prefix_words and (len(self.prefix_words) != 2 or not 0 < self.prefix_words[0] <= self.prefix_words[1]):
            raise UserError(f"data.prefix_words is {list(self.prefix_words)}; it must be [least, most], e.g. [2, 8].")


@dataclass
class RejectionSampling(MadePairs):
    """Pairs and SFT examples chosen among many samples of a policy by a scorer."""

    source: str = "rejection"
    policy: str | None = None
    reward_model: str | None = None
    scorer: str = "ppo_vs_dpo.reward_model.scorer:RewardScorer"
    samples: int = 8
    rule: str = "best_vs_worst"
    rso_beta: float = 0.5
    pairs_per_prompt: int = 1
    prompts_per_step: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in ("best_vs_worst", "rso", "bradley_terry"):
            raise UserError(f"data.rule is {self.rule!r}; it must be best_vs_worst, rso or bradley_terry.")
        if self.reward_model is None and self.gold is None:
            raise UserError("data.reward_model or data.gold: one of them must score the samples.")


@dataclass
class Endpoint:
    """A model that answers conversations."""

    kind: str = "local"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    requests_at_once: int = 8
    function: str | None = None

    def __post_init__(self):
        if self.kind not in ("local", "openai", "python"):
            raise UserError(f"an endpoint's kind is {self.kind!r}; it must be local, openai or python.")
        if self.kind == "openai" and not self.model:
            raise UserError("an endpoint of kind openai needs model, the model's name there.")
        if self.kind == "python" and not self.function:
            raise UserError("an endpoint of kind python needs function, package.module:factory.")


@dataclass
class ConstitutionalPairs(MadePairs):
    """Constitutional AI (Bai et al. 2022b): pairs from principles instead of people."""

    source: str = "constitution"
    constitution: str = "default"
    mode: str = "revision"
    rounds: int = 2
    few_shot: str | None = None
    system: str | None = None
    helper: Endpoint = field(default_factory=Endpoint)
    critic: Endpoint = field(default_factory=Endpoint)
    judge: Endpoint = field(default_factory=Endpoint)
    chain_of_thought: bool = False
    label_clamp: float | None = None
    max_growth: float = 4.0
    batch: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("revision", "feedback", "both"):
            raise UserError(f"data.mode is {self.mode!r}; it must be revision, feedback or both.")
        if self.chain_of_thought and self.mode == "revision":
            raise UserError("data.chain_of_thought is for the judge: it needs data.mode=feedback or both.")

    @property
    def largest_label(self) -> float:
        """Upper limit of the soft labels."""
        if self.label_clamp is not None:
            return self.label_clamp
        return 0.6 if self.chain_of_thought else 1.0


SOURCES: dict[str, type] = {
    "testbed": ReviewTestbed,
    "pairs": GivenPairs,
    "rejection": RejectionSampling,
    "constitution": ConstitutionalPairs,
}
# Where each source's two steps are.
_STEPS = {
    "testbed": {"data": "testbed.world", "pairs": "testbed.pairs"},
    "pairs": {"data": "given.pairs", "pairs": "given.pairs"},
    "rejection": {"data": "given.prompts", "pairs": "rejection.pairs"},
    "constitution": {"data": "given.prompts", "pairs": "constitution.pairs"},
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
    return f"{__package__}.{_STEPS[source][step]}"
