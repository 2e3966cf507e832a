"""Completions of every policy on the held-out prompts: drawn once, kept as Parquet, reused by every judge."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet, sha256_of, write_json, write_parquet
from ppo_vs_dpo.artifacts.guards.versions import DECISIVE, versions
from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.sampling.kl import on_heldout_pairs, sequence_kl
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import check_response_budget, eos_token_ids, load_policy, load_tokenizer
from ppo_vs_dpo.models.loading.vocabulary import check_same_vocabulary
from ppo_vs_dpo.models.passes.inference import Frozen, Ranks
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, row_seed
from ppo_vs_dpo.models.text.encoding import encode_prompts
from ppo_vs_dpo.models.text.prompts import decode_completions

# Bumped when the meaning of a column changes: older files are then drawn again.
LAYOUT = 3
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
        under: another policy -> log-probability of these completions under it, in nats (`cross_logprobs`).
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
    under: dict[str, np.ndarray] = field(default_factory=dict)

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
        if policy.name in settings.best_of:
            # Measured: best-of-n over a policy is as far from the reference as what it selects.
            plans.append(DrawPlan("pool", 2 * max(settings.best_of[policy.name]), main, True))
    if policy.checkpoint:
        return plans
    return plans + [DrawPlan("sample", 1, t, t > 0) for t in settings.other_temperatures if t != main]


class Reference:
    """The reference policy, loaded once, with its tokenizer and the encoded prompts."""

    def __init__(
        self,
        folder: str | Path,
        prompts: Prompts,
        settings: CompareStage,
        model_config: ModelConfig,
        ranks: Ranks,
        pairs: Sequence[dict[str, Any]] = (),
    ):
        self.folder, self.model_config, self.ranks, self.pairs = str(folder), model_config, ranks, pairs
        self.likelihoods: dict[int, dict[str, np.ndarray]] = {}
        self.tokenizer = load_tokenizer(folder, model_config)
        self.frozen = ranks.load(load_policy, folder, model_config)
        self.model = self.frozen.model
        self.prompts = prompts
        self.prompt_ids = encode_prompts(self.tokenizer, prompts.prompts)
        longest = max(map(len, self.prompt_ids))
        check_response_budget(self.model, longest, settings.max_new_tokens, "compare.max_new_tokens")


def completions_key(policy: Policy, prompts: Prompts, settings: CompareStage, seed: int, reference: Any) -> str:
    """Hash of everything a policy's completions depend on: their file is named after it.

    Contents count, not names or times: what is drawn is used again whenever the same would be drawn.
    """
    sampling = [settings.max_new_tokens, settings.top_k, settings.top_p, settings.temperature]
    plans = [[p.role, p.draws, p.temperature, p.measure] for p in plan(policy, settings)]
    asked = [prompts.ids, prompts.prompts]
    made_with = {name: version for name, version in versions().items() if name in (*DECISIVE, "ppo-vs-dpo")}
    everything = [LAYOUT, policy.name, policy.identity, reference, asked, sampling, plans, seed, made_with]
    return sha256_of(everything)[:16]


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
) -> tuple[pa.Table, dict[str, Any]]:
    """Draw and measure all completions of one policy; all ranks must call this, and all get everything.

    Every row has its own stream, named by policy, role, draw, temperature and prompt: policies never share random
    numbers (their win rate is between *independent* draws), and neither batch size nor the number of ranks changes
    anything.

    Returns:
        One row a completion, and what else was learned while the model was loaded (`on_heldout_pairs`, cost).

    Raises:
        UserError: another vocabulary than the reference's.
    """
    started = time.monotonic()
    frozen, tokenizer = reference.frozen, reference.tokenizer
    if policy.name != REFERENCE:
        frozen = reference.ranks.load(load_policy, policy.model, reference.model_config)
        tokenizer = load_tokenizer(policy.model, reference.model_config)
    measurable = _same_tokens(policy, frozen.model, tokenizer, reference)
    prompt_ids = reference.prompt_ids if measurable else encode_prompts(tokenizer, reference.prompts.prompts)
    plans = plan(policy, settings)
    total = sum(p.draws for p in plans) * len(prompt_ids)
    tables, before = [], 0
    for part in plans:
        report_progress = None
        if progress is not None:

            def report_progress(done: int, _: int, start: int = before) -> None:
                progress(start + done, total)

        table = draw_part(
            policy.name, part, frozen, tokenizer, prompt_ids, reference, measurable, settings, seed, report_progress
        )
        before += len(table)
        tables.append(table)
    table = pa.concat_tables(tables)
    extra = {
        "measurable": measurable,
        "displacement": on_heldout_pairs(frozen.model, reference, seed)
        if measurable and not policy.checkpoint
        else None,
        "tokens_generated": int(np.sum(table["tokens"].to_numpy())),
        "seconds": round(time.monotonic() - started, 3),
        "parameters": frozen.count_parameters(),
    }
    if frozen is not reference.frozen:
        frozen.release()
    return table, extra


def draw_part(
    name: str,
    part: DrawPlan,
    frozen: Frozen,
    tokenizer: Any,
    prompt_ids: list[list[int]],
    reference: Reference,
    measurable: bool,
    settings: CompareStage,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Draw one role at one temperature; a row a completion, draw by draw. Each rank draws and measures its share."""
    sampling = SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=part.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    )
    ids, ranks = reference.prompts.ids, reference.ranks
    slots = [(draw, row) for draw in range(part.draws) for row in range(len(prompt_ids))]
    n = len(slots)
    own = [slots[number] for number in ranks.share(n)]
    with frozen.generating():
        drawn = generate(
            frozen.model,
            [prompt_ids[row] for _, row in own],
            sampling,
            eos_token_ids=eos_token_ids(frozen.model, tokenizer),
            seeds=[row_seed(seed, "compare", name, part.role, part.temperature, draw, ids[row]) for draw, row in own],
            progress=None if progress is None else lambda done, _: progress(min(done * ranks.world, n), n),
        )
    generated = ranks.merge(drawn, n)
    measures = {measure: np.full(n, np.nan) for measure in MEASURES}
    if part.measure and measurable:
        found = sequence_kl(
            frozen.model,
            reference.model,
            [prompt_ids[row] for _, row in own],
            [sample.token_ids for sample in drawn],
            reference.tokenizer.pad_token_id,
            temperature=part.temperature,
        )
        of_row = np.stack([found.exact, found.k1, found.k3, found.logprob, found.reference_logprob], axis=1)
        measures = dict(zip(MEASURES, np.stack(ranks.merge(of_row, n), axis=1), strict=True))
    texts = decode_completions(tokenizer, [sample.token_ids for sample in generated])
    finished, tokens = zip(*((sample.finished, sample.token_ids) for sample in generated), strict=True)
    return table_of(name, part.role, part.temperature, slots, ids, texts, finished, tokens, measures)


def table_of(
    name: str,
    role: str,
    temperature: float,
    slots: list[tuple[int, int]],
    ids: list[str],
    texts: Sequence[str],
    finished: Sequence[bool],
    tokens: Sequence[list[int]],
    measures: dict[str, np.ndarray],
) -> pa.Table:
    """Completions as rows; ``slots`` say of each which draw it is, and of which of the prompts ``ids``."""
    n = len(slots)
    return pa.table(
        {
            "policy": [name] * n,
            "role": [role] * n,
            "temperature": np.full(n, float(temperature)),
            "draw": np.array([draw for draw, _ in slots], dtype=np.int32),
            "row": np.array([row for _, row in slots], dtype=np.int32),
            "prompt_id": [ids[row] for _, row in slots],
            "completion": list(texts),
            "finished": np.array(finished),
            "tokens": np.array([len(one) for one in tokens], dtype=np.int32),
            "token_ids": pa.array(tokens, type=pa.list_(pa.int32())),
            **measures,
        }
    )


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
    ranks: Ranks,
    make: Callable[[], tuple[pa.Table, dict[str, Any]]],
) -> tuple[pa.Table, dict[str, Any]]:
    """The policy's completions and what was learned with them, from their files, or drawn now and written.

    Files under other keys stay: other settings, or a model that has been trained again since, may ask for them once
    more. The main process reads and writes; all ranks draw.
    """
    path = completions_path(folder, policy, key)
    found = ranks.agree(lambda: _kept(path))
    if found is None:
        found = make()
        if ranks.is_main:
            _keep(path, *found)
    return found


def _kept(path: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        table = read_parquet(path, ["completion", "role", "row"]).data.table
        return table, read_json(path.with_suffix(".json"))
    except UserError:
        path.unlink()  # truncated, or without its companion: to be drawn again
        return None


def _keep(path: Path, table: pa.Table, extra: dict[str, Any]) -> None:
    from datasets import Dataset

    # The companion first: a Parquet file that is there is complete.
    write_json(path.with_suffix(".json"), extra)
    write_parquet(path, Dataset(table))


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
