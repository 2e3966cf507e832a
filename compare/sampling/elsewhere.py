"""Completions made elsewhere: a file with a prompt and a completion a row, compared like any other policy's."""

from typing import Any

import numpy as np
import pyarrow as pa

from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.sampling.completions import MEASURES, Reference
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts
from ppo_vs_dpo.compare.sampling.rows import match
from ppo_vs_dpo.models.text.encoding import encode_completions


class NoReference:
    """Stands where no model is known at all: lengths are in words, and there is no KL."""

    def __init__(self, prompts: Prompts):
        self.prompts, self.tokenizer = prompts, None


def completions_elsewhere(
    policy: Policy, reference: Reference | NoReference, settings: CompareStage
) -> tuple[pa.Table, dict[str, Any]]:
    """The table of a policy whose completions were made elsewhere; its KL is not known.

    Every prompt needs at least ``samples`` completions; further ones are not used. A row may have ``finished``
    (default true). Tokens are counted with the reference's tokenizer; without a reference they are words.

    Raises:
        UserError: a prompt without (enough) completions, or a row without text; names them.
    """
    where = f"compare.policies.{policy.name}: {policy.completions}"
    prompts = reference.prompts
    samples = 1 if policy.name == REFERENCE else settings.samples
    found = match(policy.completions, prompts.prompts, prompts.ids, samples, where)
    slots = [(draw, row) for draw in range(samples) for row in range(len(prompts))]
    texts = [found[row][draw][0] for draw, row in slots]
    finished = [found[row][draw][1] for draw, row in slots]
    if reference.tokenizer is None:
        tokens = [list(range(len(text.split()))) for text in texts]
    else:
        tokens = encode_completions(reference.tokenizer, texts, finished)
    n = len(slots)
    table = pa.table(
        {
            "policy": [policy.name] * n,
            "role": ["baseline" if policy.name == REFERENCE else "sample"] * n,
            "temperature": np.full(n, float(settings.temperature)),
            "draw": np.array([draw for draw, _ in slots], dtype=np.int32),
            "row": np.array([row for _, row in slots], dtype=np.int32),
            "prompt_id": [prompts.ids[row] for _, row in slots],
            "completion": texts,
            "finished": np.array(finished),
            "tokens": np.array([len(ids_) for ids_ in tokens], dtype=np.int32),
            "token_ids": pa.array(tokens, type=pa.list_(pa.int32())),
            **{measure: np.full(n, np.nan) for measure in MEASURES},
        }
    )
    unknown = ("displacement", "tokens_generated", "seconds", "parameters")
    return table, {"measurable": False, **dict.fromkeys(unknown)}
