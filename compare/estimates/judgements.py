"""Which judges a comparison asks, and the judgements of those that read instead of scoring."""

import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import atomic_path
from ppo_vs_dpo.artifacts.settings import nearest, split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.estimates.win_rates import PairTable
from ppo_vs_dpo.compare.judges.agreement import position_bias
from ppo_vs_dpo.compare.judges.scores import FunctionJudge, RewardModelJudge
from ppo_vs_dpo.compare.sampling.contenders import Contender, shown_columns
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Prompts
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.judging.cache import Cache
from ppo_vs_dpo.preferences.judging.llm import ORDERS, Comparison, Judgement, LLMJudge, LLMJudgeConfig
from ppo_vs_dpo.preferences.schema import text_of

KINDS = ("function", "reward_model", "llm")


def replies_file(context: StageContext) -> Path:
    """Where the replies of judges that read are kept: beside the stages, for they were paid for.

    A run that kept them in ``compare/`` begins with those.
    """
    path, before = context.run.cache("judge_replies.jsonl"), context.dir / "judge_cache.jsonl"
    if before.is_file() and not path.exists():
        with atomic_path(path) as temporary:
            shutil.copy(before, temporary)
    return path


def own_rewards(context: StageContext) -> list[str]:
    """The functions that PPO of this run was rewarded by (``ppo.reward``)."""
    reward = (context.run.config.get("ppo") or {}).get("reward") or []
    parts = [reward] if isinstance(reward, str) else list(reward)
    return [one for one in parts if ":" in one] if context.run.done("ppo") is not None else []


def make_judges(
    context: StageContext, entries: list[Any], ranks: Ranks
) -> tuple[list[FunctionJudge | RewardModelJudge], list[LLMJudge]]:
    """The gold function, PPO's own rewards, the reward model, where there are any, and ``compare.judges``.

    Returns:
        Judges that score, and judges that read.

    Raises:
        UserError: an unknown kind or key, or a name that is taken; or no judge at all.
    """
    scoring: list[FunctionJudge | RewardModelJudge] = []
    reading: list[LLMJudge] = []
    gold = (context.run.config.get("data") or {}).get("gold")
    if gold:
        scoring.append(FunctionJudge(gold))
    for function in own_rewards(context):
        scoring.append(FunctionJudge(function, function.rpartition(":")[2]))
        scoring[-1].in_sample = True  # PPO was trained to please it
    if context.run.done("reward_model") is not None:
        folder = context.run.stage_dir("reward_model") / "model"
        scoring.append(RewardModelJudge(folder, model_settings(context), ranks))
    cache = Cache(replies_file(context))
    taken = {judge.name for judge in scoring}
    for number, entry in enumerate(entries):
        where = f"compare.judges[{number}]"
        if not isinstance(entry, dict) or entry.get("kind") not in KINDS:
            kind = entry.get("kind") if isinstance(entry, dict) else entry
            raise UserError(
                f"{where}: kind is {kind!r}; it must be one of {', '.join(KINDS)}.{nearest(str(kind), list(KINDS))}"
            )
        name = str(entry.get("name", entry["kind"]))
        if name in taken:
            raise UserError(f"{where}: the name {name} is taken; give the judge another name: key.")
        taken.add(name)
        if entry["kind"] == "llm":
            config, _ = split({**entry, "name": name}, LLMJudgeConfig, where=where, kind="judge")
            reading.append(LLMJudge(config, cache=cache))
        else:
            scoring.append(_scoring(entry, name, where, context, ranks))
    if not scoring and not reading:
        raise UserError("there is no judge: no data.gold, no reward model, and compare.judges is empty. Name one.")
    return scoring, reading


def _scoring(
    entry: dict[str, Any], name: str, where: str, context: StageContext, ranks: Ranks
) -> FunctionJudge | RewardModelJudge:
    key = {"function": "function", "reward_model": "path"}[entry["kind"]]
    others = {"kind", "name"} | ({"head"} if key == "path" else set())
    unknown = sorted(set(entry) - {*others, key})
    if unknown or key not in entry:
        problem = f"{unknown[0]}: no such key" if unknown else f"{key}: required, and not set"
        allowed = ", ".join([*sorted(others - {"kind"}), key])
        raise UserError(f"{where}.{problem}. A judge of kind {entry['kind']} has {allowed}.")
    if entry["kind"] == "function":
        return FunctionJudge(str(entry[key]), name)
    head = entry.get("head")
    judge = RewardModelJudge(str(entry[key]), model_settings(context), ranks, name, head and str(head))
    judge.in_sample = False  # no policy of this run was trained on it
    return judge


def comparisons_of(judge: LLMJudge, contenders: list[Contender], prompts: Prompts) -> list[Comparison]:
    """What a judge that reads is asked: its pairs, one shown completion each, on its first ``n_prompts`` prompts.

    Raises:
        UserError: a pair names a policy that there is not, or a policy against itself.
    """
    by_name = {contender.name: contender for contender in contenders}
    pairs = [tuple(pair) for pair in judge.config.pairs] or main_pairs(contenders)
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(by_name):
            missing = [name for name in pair if name not in by_name]
            hint = nearest(str(missing[0]), list(by_name)) if missing else ""
            raise UserError(f"judge {judge.name}: pairs: {list(pair)} is not a pair of two policies.{hint}")
    texts = {name: shown_texts(by_name[name]) for name in {name for pair in pairs for name in pair}}
    rows = range(min(len(prompts), judge.config.n_prompts or len(prompts)))
    return [
        Comparison(
            policy, versus, prompts.ids[row], text_of(prompts.prompts[row]), texts[policy][row], texts[versus][row]
        )
        for policy, versus in pairs
        for row in rows
    ]


def main_pairs(contenders: list[Contender]) -> list[tuple[str, str]]:
    """All pairs of the policies without a sweep point, and of the largest best-of-n."""
    main = [c.name for c in contenders if not c.point]
    best = [c.name for c in contenders if c.n is not None and c.base == REFERENCE]
    return [(b, a) for a, b in combinations([*main, *best[-1:]], 2)]


def shown_texts(contender: Contender) -> list[str]:
    """The completion of each prompt that is shown and read."""
    per = contender.draws.shape[1]
    return [contender.draws.texts[row * per + column] for row, column in enumerate(shown_columns(contender))]


def table_of(judgements: list[Judgement], prompts: Prompts) -> tuple[PairTable | None, dict[str, Any]]:
    """Preferences averaged over both orders, NaN where one of them named no verdict; and what the judge is like.

    Where a question was asked several times, an order's preference is the mean of its verdicts.

    Returns:
        The table (``None`` without any usable judgement), and ``position_bias``, ``excluded``, ``judged``; where there
        are any, ``refused`` and ``cut_off`` (of the comparisons left out, those with such a reply).
    """
    row_of = {identity: row for row, identity in enumerate(prompts.ids)}
    pairs = list(dict.fromkeys((one.policy, one.versus) for one in judgements))
    sums = {order: np.zeros((len(prompts), len(pairs))) for order in ORDERS}
    counts = {order: np.zeros((len(prompts), len(pairs))) for order in ORDERS}
    for one in judgements:
        if one.preference is not None:
            place = row_of[one.prompt_id], pairs.index((one.policy, one.versus))
            sums[one.order][place] += one.preference
            counts[one.order][place] += 1
    orders = {o: np.where(counts[o] > 0, sums[o] / np.maximum(counts[o], 1), np.nan) for o in ORDERS}
    mean = (orders["forward"] + orders["swapped"]) / 2
    asked = {(one.policy, one.versus, one.prompt_id) for one in judgements}
    known = int(np.isfinite(mean).sum())
    figures = {
        "judged": known,
        "excluded": len(asked) - known,
        "position_bias": position_bias(orders["forward"].ravel(), orders["swapped"].ravel()),
    }
    for key, why in (("refused", "refused"), ("cut_off", "cut off")):
        lost = {(one.policy, one.versus, one.prompt_id) for one in judgements if one.why == why}
        lost = {x for x in lost if np.isnan(mean[row_of[x[2]], pairs.index(x[:2])])}
        figures |= {key: len(lost)} if lost else {}
    usable = np.isfinite(mean).any(axis=0) if len(pairs) else np.zeros(0, dtype=bool)
    if not usable.any():
        return None, figures
    kept = [pair for pair, use in zip(pairs, usable, strict=True) if use]
    ties = np.where(np.isfinite(mean), mean == 0.5, np.nan)
    return PairTable(kept, mean[:, usable], ties[:, usable]), figures


# Under these names the two sides of a held-out pair stand before a judge that reads.
CHOSEN, REJECTED = "chosen", "rejected"


def pair_comparisons(pairs: Sequence[dict[str, Any]], limit: int) -> list[Comparison]:
    """The first held-out pairs as comparisons: whether the judge finds the chosen side better says what it
    is worth.
    """
    found = []
    for row in range(min(len(pairs), limit)):
        pair = pairs[row]
        sides = [
            side if isinstance(side, str) else str(side[-1]["content"]) for side in (pair[CHOSEN], pair[REJECTED])
        ]
        found.append(Comparison(CHOSEN, REJECTED, f"pair {row}", text_of(pair["prompt"]), *sides))
    return found


def split_pairs(judgements: list[Judgement]) -> tuple[list[Judgement], dict[str, int]]:
    """Judgements of policies, and on how many held-out pairs the judge is right over both orders; ties are
    not counted.
    """
    of_pair: dict[str, list[float | None]] = {}
    rest = []
    for one in judgements:
        if (one.policy, one.versus) == (CHOSEN, REJECTED):
            of_pair.setdefault(one.prompt_id, []).append(one.preference)
        else:
            rest.append(one)
    means = [float(np.mean(seen)) for seen in of_pair.values() if None not in seen]
    return rest, {"n": sum(mean != 0.5 for mean in means), "right": sum(mean > 0.5 for mean in means)}
