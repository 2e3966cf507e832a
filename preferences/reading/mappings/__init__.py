"""From a source's row to a pair of the schema, for the data sets that people use and those they make.

A mapping takes a row and `MappingOptions` and returns ``prompt``, ``chosen``, ``rejected`` and, where the source has
them, ``chosen_score``, ``rejected_score`` and ``margin``. It raises `UnmappableError` for a row that is not what it
should be and `FilteredError` for one that is fine and not wanted (a tie, a weak vote).
"""

from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.preferences.reading.mappings import public
from ppo_vs_dpo.preferences.reading.mappings.base import (
    PARTS,
    FilteredError,
    Mapping,
    MappingOptions,
    UnmappableError,
    is_null,
    value_of,
)
from ppo_vs_dpo.preferences.reading.mappings.gathered import GATHERED
from ppo_vs_dpo.preferences.reading.mappings.general import convert, hh, implicit, pairs
from ppo_vs_dpo.preferences.reading.mappings.messages import DIALOGUE, dialogue_text, parse_dialogue

__all__ = [
    "GATHERED",
    "MAPPINGS",
    "PARTS",
    "FilteredError",
    "Mapping",
    "MappingOptions",
    "UnmappableError",
    "convert",
    "detect",
    "dialogue_text",
    "map_row",
    "mapping_named",
    "pairs",
    "parse_dialogue",
    "value_of",
]

MAPPINGS: dict[str, Mapping] = {
    "pairs": pairs,
    "implicit": implicit,
    "hh": hh,
    "ultrafeedback": pairs,
    "ultrafeedback_raw": public.ultrafeedback_raw,
    "orca": public.orca,
    "llama_factory": public.llama_factory,
    "openai": public.openai,
    "tldr": public.tldr,
    "summarize": public.summarize,
    "shp": public.shp,
    "safe_rlhf": public.safe_rlhf,
    "alpaca_eval": public.alpaca_eval,
    "webgpt": public.webgpt,
    "gold_labelled": public.gold_labelled,
    "nectar": public.nectar,
    "helpsteer": public.helpsteer,
    "stack_exchange": public.stack_exchange,
    "stack_exchange_votes": public.stack_exchange_votes,
    "argilla": public.argilla,
    "unified_feedback": public.unified_feedback,
    "reward_bench_2": public.reward_bench_2,
    "arena": public.arena,
    # Of several rows, or several pairs of one: `gathered` has made rows of pairs of them.
    **dict.fromkeys(GATHERED, pairs),
}
# Columns by which a source is known, the most telling first.
_SIGNS: tuple[tuple[set[str], str], ...] = (
    ({"instruction", "output_1", "output_2", "preference"}, "alpaca_eval"),
    ({"history", "human_ref_A", "human_ref_B", "labels"}, "shp"),
    ({"response_0", "response_1", "better_response_id"}, "safe_rlhf"),
    ({"input", "preferred_output", "non_preferred_output"}, "openai"),
    ({"info", "summaries", "choice", "query", "chosen", "rejected"}, "tldr"),
    ({"info", "summaries", "choice"}, "summarize"),
    ({"question", "answer_0", "answer_1", "score_0", "score_1"}, "webgpt"),
    ({"instruction", "answers", "preference"}, "gold_labelled"),
    ({"prompt", "answers", "turns"}, "nectar"),
    ({"context", "response1", "response2", "overall_preference"}, "helpsteer"),
    ({"prompt", "response_1", "response_2", "preference_strength"}, "helpsteer"),
    ({"question", "response_j", "response_k"}, "stack_exchange"),
    ({"qid", "question", "answers"}, "stack_exchange_votes"),
    ({"prompt", "response", "helpfulness", "correctness"}, "rated"),
    ({"message_tree_id", "parent_id", "role", "text"}, "oasst"),
    ({"message_tree_id", "tree_state", "prompt"}, "oasst_trees"),
    ({"conv_A", "conv_B", "conv_A_rating", "conv_B_rating"}, "unified_feedback"),
    ({"prompt", "chosen", "rejected", "num_correct", "num_incorrect"}, "reward_bench_2"),
    ({"conversation_a", "conversation_b", "winner"}, "arena"),
    ({"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}, "arena"),
    ({"instruction", "completions", "models"}, "ultrafeedback_raw"),
)
# The same, for sources that a column ``prompt`` would make ordinary pairs.
_WITHOUT_PROMPT: tuple[tuple[set[str], str], ...] = (
    ({"query", "chosen", "rejected"}, "tldr"),
    ({"instruction", "chosen", "rejected"}, "llama_factory"),
    ({"instruction", "chosen_response", "rejected_response"}, "argilla"),
    ({"system", "question", "chosen", "rejected"}, "orca"),
    ({"system", "input", "chosen", "rejected"}, "orca"),
)


def detect(row: dict[str, Any], options: MappingOptions | None = None) -> str:
    """The mapping that fits a source, by its first row. Who names columns has pairs."""
    if options is not None and options.columns:
        return "pairs"
    signs = _SIGNS if "prompt" in row else (*_SIGNS, *_WITHOUT_PROMPT)
    for columns, name in signs:
        if columns <= set(row):
            return name
    is_dialogue = all(
        isinstance(row.get(side), str) and row[side].startswith(DIALOGUE) for side in ("chosen", "rejected")
    )
    return "hh" if is_dialogue and row.get("prompt") is None else "pairs"


def mapping_named(name: str) -> Mapping:
    """The mapping of a name.

    Raises:
        UserError: there is none.
    """
    if name not in MAPPINGS:
        raise UserError(
            f"data.format is {name!r}; it must be auto or one of {', '.join(MAPPINGS)}.{nearest(name, list(MAPPINGS))}"
        )
    return MAPPINGS[name]


def map_row(row: dict[str, Any], mapping: Mapping, options: MappingOptions) -> dict[str, Any]:
    """A pair of the schema, without ids, in the asked-for form."""
    known = {name: None if is_null(value) else value for name, value in row.items()}
    pair = mapping(known, options)
    if options.render is not None:
        return options.render(convert(pair, True))
    return convert(pair, options.conversational)
