"""Completions made elsewhere: a file with a prompt and a completion a row, compared like any other policy's."""

from typing import Any

import numpy as np
import pyarrow as pa

from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.sampling.completions import MEASURES, Reference, table_of
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
    role = "baseline" if policy.name == REFERENCE else "sample"
    measures = {measure: np.full(len(slots), np.nan) for measure in MEASURES}
    temperature = settings.temperature
    table = table_of(policy.name, role, temperature, slots, prompts.ids, texts, finished, tokens, measures)
    unknown = ("displacement", "tokens_generated", "seconds", "parameters")
    return table, {"measurable": False, **dict.fromkeys(unknown)}
