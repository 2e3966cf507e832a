"""Completions made elsewhere: a file with a prompt and a completion a row, compared like any other policy's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, read_parquet
from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.sampling.completions import MEASURES, Reference
from ppo_vs_dpo.compare.sampling.policies import Policy
from ppo_vs_dpo.models.text.encoding import encode_completions
from ppo_vs_dpo.preferences.schema import prompt_id


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a Parquet, JSON or JSON-lines file."""
    path = Path(path)
    if path.suffix == ".parquet":
        return read_parquet(path, ["completion"]).to_list()
    rows = read_json(path) if path.suffix == ".json" else read_jsonl(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a list of objects with prompt (or prompt_id) and completion is needed.")
    return rows


def completions_elsewhere(
    policy: Policy, reference: Reference, settings: CompareStage
) -> tuple[pa.Table, dict[str, Any]]:
    """The table of a policy whose completions were made elsewhere; its KL is not known.

    Every held-out prompt needs at least ``samples`` completions; further ones are not used. A row may have
    ``finished`` (default true). Tokens are counted with the reference's tokenizer.

    Raises:
        UserError: a held-out prompt without (enough) completions, or a row without text; names them.
    """
    where = f"compare.policies.{policy.name}: {policy.completions}"
    by_prompt: dict[str, list[tuple[str, bool]]] = {}
    for number, row in enumerate(read_rows(policy.completions)):
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{where}, row {number}: completion is missing or is not a text.")
        if row.get("prompt_id") is None and row.get("prompt") is None:
            raise UserError(f"{where}, row {number}: neither prompt nor prompt_id.")
        identity = row.get("prompt_id") or prompt_id(_plain(row["prompt"]))
        by_prompt.setdefault(identity, []).append((row["completion"], bool(row.get("finished", True))))
    ids = reference.prompts.ids
    short = [identity for identity in ids if len(by_prompt.get(identity, [])) < settings.samples]
    if short:
        raise UserError(
            f"{where} has fewer than {settings.samples} completions for {len(short)} of {len(ids)} held-out prompts "
            f"(the first is {short[0]}). Make completions for every prompt of data/prompts_heldout.parquet."
        )
    slots = [(draw, row) for draw in range(settings.samples) for row in range(len(ids))]
    texts = [by_prompt[ids[row]][draw][0] for draw, row in slots]
    finished = [by_prompt[ids[row]][draw][1] for draw, row in slots]
    tokens = encode_completions(reference.tokenizer, texts, finished)
    n = len(slots)
    table = pa.table(
        {
            "policy": [policy.name] * n,
            "role": ["sample"] * n,
            "temperature": np.full(n, float(settings.temperature)),
            "draw": np.array([draw for draw, _ in slots], dtype=np.int32),
            "row": np.array([row for _, row in slots], dtype=np.int32),
            "prompt_id": [ids[row] for _, row in slots],
            "completion": texts,
            "finished": np.array(finished),
            "tokens": np.array([len(ids_) for ids_ in tokens], dtype=np.int32),
            "token_ids": pa.array(tokens, type=pa.list_(pa.int32())),
            **{measure: np.full(n, np.nan) for measure in MEASURES},
        }
    )
    unknown = ("displacement", "tokens_generated", "seconds", "parameters")
    return table, {"measurable": False, **dict.fromkeys(unknown)}


def _plain(prompt: Any) -> Any:
    """A conversation that was written as JSON text is a conversation."""
    if isinstance(prompt, str) and prompt.lstrip().startswith('[{"'):
        try:
            return json.loads(prompt)
        except json.JSONDecodeError:
            return prompt
    return prompt
