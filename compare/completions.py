"""Completions of every policy on the held-out prompts: drawn once, kept as Parquet, reused by every judge."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from artifacts.errors import UserError
from artifacts.files import read_parquet, sha256_of, write_parquet
from compare.config import CompareStage
from compare.kl import sequence_kl
from compare.policies import REFERENCE, Policy, Prompts
from models.config import ModelConfig
from models.generation import SamplingConfig, generate, row_seed
from models.loading import (
    check_response_budget,
    check_same_vocabulary,
    eos_token_ids,
    load_policy,
    load_tokenizer,
)
from models.prompts import decode_completion, encode_prompt

# Bumped when the meaning of a column changes: older files are then drawn again.
LAYOUT = 1
MEASURES = ("kl", "k1", "k3", "logprob", "reference_logprob")


@dataclass(frozen=True)
class DrawPlan:
    """What is drawn from one policy for every prompt.

    Attributes:
        role: ``sample`` (a policy's own), ``baseline`` (of the reference), ``pool`` (best-of-n selects from it).
        draws: how many a prompt.
        temperature: of sampling.
        measure: whether KL and log-probabilities are measured on them.
    """

    role: str
    draws: int
    temperature: float
    measure: bool


@dataclass
class Draws:
    """The completions of one policy, role and temperature; arrays ``(P, D)``.

    Attributes:
        texts: flat list, row ``prompt * D + draw``.
        token_ids: tokens of each text, the same order.
        finished: ended by itself.
        tokens: length in tokens, the end of sequence included.
        measures: ``kl``, ``k1``, ``k3``, ``logprob``, ``reference_logprob`` in nats, NaN where not measured.
        scores: judge -> score; filled by the judges.
    """

    policy: str
    role: str
    temperature: float
    texts: list[str]
    token_ids: list[list[int]]
    finished: np.ndarray
    tokens: np.ndarray
    measures: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, D)``."""
        return self.finished.shape


def plan(policy: Policy, settings: CompareStage) -> list[DrawPlan]:
    """What to draw from a policy."""
    main = settings.temperature
    if policy.name == REFERENCE:
        plans = [DrawPlan("baseline", settings.baseline_draws, main, True)]
        if settings.pool_size:
            # KL needs no pool; the log-probabilities of what best-of-n selects do (Beirami's estimate).
            plans.append(DrawPlan("pool", settings.pool_size, main, False))
    else:
        plans = [DrawPlan("sample", settings.samples, main, True)]
    return plans + [DrawPlan("sample", 1, t, t > 0) for t in settings.other_temperatures if t != main]


class Reference:
    """The reference policy, loaded once, with its tokenizer and the encoded prompts."""

    def __init__(self, folder: str | Path, prompts: Prompts, settings: CompareStage, model_config: ModelConfig):
        self.folder, self.model_config = str(folder), model_config
        self.tokenizer = load_tokenizer(folder, model_config)
        self.model = load_policy(folder, model_config)
        self.prompts = prompts
        self.prompt_ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts.prompts]
        longest = max(map(len, self.prompt_ids))
        check_response_budget(self.model, longest, settings.max_new_tokens, "compare.max_new_tokens")


def completions_key(policy: Policy, prompts: Prompts, settings: CompareStage, seed: int, reference: Any) -> str:
    """Hash of everything a policy's completions depend on: their file is named after it."""
    sampling = [settings.max_new_tokens, settings.top_k, settings.top_p, settings.temperature]
    plans = [[p.role, p.draws, p.temperature, p.measure] for p in plan(policy, settings)]
    return sha256_of([LAYOUT, policy.name, policy.identity, reference, prompts.ids, sampling, plans, seed])[:16]


def completions_path(folder: Path, policy: Policy, key: str) -> Path:
    """Where one policy's completions are kept until all are there."""
    name = "".join(c if c.isalnum() or c in "._=-" else "_" for c in policy.name)[:80]
    return folder / f"{name}-{key}.parquet"


def draw(
    policy: Policy,
    reference: Reference,
    settings: CompareStage,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Draw and measure all completions of one policy.

    Every row has its own stream, named by policy, role, draw, temperature and prompt: policies never share random
    numbers (their win rate is between *independent* draws), and batch size changes nothing.

    Raises:
        UserError: another vocabulary than the reference's.
    """
    if policy.name == REFERENCE:
        model, tokenizer = reference.model, reference.tokenizer
    else:
        model = load_policy(policy.model, reference.model_config)
        tokenizer = load_tokenizer(policy.model, reference.model_config)
    measurable = _same_tokens(policy, model, tokenizer, reference)
    prompt_ids = (
        reference.prompt_ids if measurable else [encode_prompt(tokenizer, p) for p in reference.prompts.prompts]
    )
    plans = plan(policy, settings)
    total = sum(p.draws for p in plans) * len(prompt_ids)
    tables, before = [], 0
    for part in plans:
        sampling = SamplingConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=part.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
        )
        slots = [(draw, row) for draw in range(part.draws) for row in range(len(prompt_ids))]
        generated = generate(
            model,
            [prompt_ids[row] for _, row in slots],
            sampling,
            eos_token_ids=eos_token_ids(model, tokenizer),
            seeds=[
                row_seed(seed, "compare", policy.name, part.role, part.temperature, draw, reference.prompts.ids[row])
                for draw, row in slots
            ],
            progress=lambda done, _, start=before: progress and progress(start + done, total),
        )
        before += len(slots)
        measures = {name: np.full(len(slots), np.nan) for name in MEASURES}
        if part.measure and measurable:
            found = sequence_kl(
                model,
                reference.model,
                [prompt_ids[row] for _, row in slots],
                [sample.token_ids for sample in generated],
                reference.tokenizer.pad_token_id,
                temperature=part.temperature,
            )
            measures = dict(
                zip(MEASURES, (found.exact, found.k1, found.k3, found.logprob, found.reference_logprob), strict=True)
            )
        n = len(slots)
        tables.append(
            pa.table(
                {
                    "policy": [policy.name] * n,
                    "role": [part.role] * n,
                    "temperature": np.full(n, float(part.temperature)),
                    "draw": np.array([draw for draw, _ in slots], dtype=np.int32),
                    "row": np.array([row for _, row in slots], dtype=np.int32),
                    "prompt_id": [reference.prompts.ids[row] for _, row in slots],
                    "completion": [decode_completion(tokenizer, sample.token_ids) for sample in generated],
                    "finished": np.array([sample.finished for sample in generated]),
                    "tokens": np.array([len(sample.token_ids) for sample in generated], dtype=np.int32),
                    "token_ids": pa.array([sample.token_ids for sample in generated], type=pa.list_(pa.int32())),
                    **measures,
                }
            )
        )
    return pa.concat_tables(tables)


def _same_tokens(policy: Policy, model: Any, tokenizer: Any, reference: Reference) -> bool:
    """Whether KL to the reference is defined. A policy trained in this run must have it; an added one may differ."""
    if policy.method != "other":
        check_same_vocabulary(model, reference.model)
        return True
    same = tokenizer.get_vocab() == reference.tokenizer.get_vocab()
    if same:
        check_same_vocabulary(model, reference.model)
    return same


def load_or_draw(
    policy: Policy,
    folder: Path,
    key: str,
    make: Callable[[], pa.Table],
) -> tuple[pa.Table, bool]:
    """The policy's completions from their file, or drawn now and written.

    Returns:
        The table, and whether it was drawn now. Files of the same policy under another key are removed.
    """
    from datasets import Dataset

    path = completions_path(folder, policy, key)
    if path.is_file():
        try:
            return read_parquet(path, ["completion", "role", "row"]).data.table, False
        except UserError:
            path.unlink()  # truncated by a crash of the machine: drawn again below
    table = make()
    write_parquet(path, Dataset(table))
    for old in folder.glob(f"{path.name[: -len(key) - len('.parquet') - 1]}-????????????????.parquet"):
        if old != path:
            old.unlink()
    return table, True


def split_draws(table: pa.Table, n_prompts: int) -> list[Draws]:
    """A policy's table as one `Draws` for each (role, temperature)."""
    found = []
    roles, temperatures = np.array(table["role"].to_pylist()), table["temperature"].to_numpy()
    for role, temperature in dict.fromkeys(zip(roles.tolist(), temperatures.tolist(), strict=True)):
        keep = np.flatnonzero((roles == role) & (temperatures == temperature))
        part = table.take(keep)
        # prompt-major: row = prompt * D + draw
        order = np.lexsort((part["draw"].to_numpy(), part["row"].to_numpy()))
        part = part.take(order)
        draws = len(part) // n_prompts
        shape = (n_prompts, draws)
        found.append(
            Draws(
                policy=part["policy"][0].as_py(),
                role=role,
                temperature=temperature,
                texts=part["completion"].to_pylist(),
                token_ids=part["token_ids"].to_pylist(),
                finished=part["finished"].to_numpy(zero_copy_only=False).reshape(shape),
                tokens=part["tokens"].to_numpy().reshape(shape),
                measures={name: part[name].to_numpy().reshape(shape) for name in MEASURES},
                scores={},
            )
        )
    return found
