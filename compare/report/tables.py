"""``completions.parquet`` and ``judgements.parquet``: everything the figures were computed from, for other tools."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.compare.estimates.win_rates import PairTable
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.policies import Prompts
from ppo_vs_dpo.preferences.judging.llm import Judgement

# Column of a completion's log-probability under another policy; NaN where it was not wanted.
UNDER = "logprob under "


def write_completions(path: Path, draws: list[Draws], prompts: Prompts) -> None:
    """A row for every completion, with its measures and scores."""
    columns: dict[str, list] = {"policy": [], "role": [], "temperature": [], "draw": [], "prompt_id": [], "prompt": []}
    values: dict[str, list[np.ndarray]] = {}
    across = sorted({name for one in draws for name in one.under})
    texts: list[str] = []
    for one in draws:
        n, per = one.shape
        columns["policy"] += [one.policy] * (n * per)
        columns["role"] += [one.role] * (n * per)
        columns["temperature"] += [one.temperature] * (n * per)
        columns["draw"] += list(range(per)) * n
        columns["prompt_id"] += [identity for identity in prompts.ids for _ in range(per)]
        columns["prompt"] += [prompt for prompt in prompts.prompts for _ in range(per)]
        texts += one.texts
        unknown = np.full(one.shape, np.nan)
        under = {f"{UNDER}{name}": one.under.get(name, unknown) for name in across}
        known = {"finished": one.finished, "tokens": one.tokens, **one.measures, **one.scores, **under}
        for name, array in known.items():
            values.setdefault(name, []).append(array.ravel())
    merged = {name: np.concatenate(arrays) for name, arrays in values.items()}
    write_parquet(path, {**columns, "completion": texts, **merged})


JUDGEMENTS = pa.schema(
    [
        ("judge", pa.string()),
        ("policy", pa.string()),
        ("versus", pa.string()),
        ("prompt_id", pa.string()),
        ("order", pa.string()),
        ("preference", pa.float64()),
        ("ties", pa.float64()),
        ("raw", pa.string()),
        ("attempts", pa.int32()),
        ("repeat", pa.int32()),
        ("why", pa.string()),
    ]
)


def write_judgements(path: Path, tables: dict[str, PairTable], read: list[Judgement], prompts: Prompts) -> None:
    """The preference of every judge for every pair on every prompt.

    A judge that scores has no order of presentation and no reply: ``order`` is ``none``, and ``preference`` is the
    mean over all pairs of draws, ``ties`` the share of them that tied. A judge that reads has a row for each order.
    """
    parts = [_scored(judge, table, prompts) for judge, table in tables.items()]
    if read:
        rows = {key: [getattr(one, key) for one in read] for key in JUDGEMENTS.names if key != "ties"}
        rows["ties"] = [None if one.preference is None else float(one.preference == 0.5) for one in read]
        parts.append(pa.table(rows, schema=JUDGEMENTS))
    if parts:
        write_parquet(path, Dataset(pa.concat_tables(parts)))


def _scored(judge: str, table: PairTable, prompts: Prompts) -> pa.Table:
    n, k = table.preferences.shape
    names = [np.repeat(np.array([pair[side] for pair in table.pairs], dtype=object), n) for side in (0, 1)]
    columns = {
        "judge": [judge] * (n * k),
        "policy": names[0],
        "versus": names[1],
        "prompt_id": np.tile(np.array(prompts.ids, dtype=object), k),
        "order": ["none"] * (n * k),
        "preference": table.preferences.T.ravel(),
        "ties": table.ties.T.ravel(),
        "raw": pa.nulls(n * k, pa.string()),
        "attempts": pa.nulls(n * k, pa.int32()),
        "repeat": pa.nulls(n * k, pa.int32()),
        "why": pa.nulls(n * k, pa.string()),
    }
    return pa.table(columns, schema=JUDGEMENTS)
