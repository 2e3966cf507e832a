"""What each job of a run does: updates, tokens trained, read and sampled, models loaded; from the configuration alone.

Once ``data/`` and ``pairs/`` are there, examples are counted as they are.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ppo_vs_dpo.artifacts.guards.fingerprints import point_name, points_of
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.config import VALIDATION_PROMPTS
from ppo_vs_dpo.pipeline.planning.cost.counted import at_their_longest, examples, ranks, rows_of, test_pairs
from ppo_vs_dpo.ppo.stage.config import reward_models, trained_share, trains_values

# trl's and transformers' defaults where a section says nothing.
BATCH, EPOCHS = 8, 3
# A pass through adapters alone leaves out the gradients of the frozen weights: 4 N instead of 6 N FLOPs a token.
ADAPTERS = 2 / 3
# Bytes of weights a second, from a disk (or its cache) into a model or back; SmolLM2-135M: 0.54 GB in 1 s, or less.
LOADED = 5e8
# Rows that a rollout decodes at once, and pairs that compare reads (models.sampling.generation, compare.sampling.kl,
# compare.sampling.gather).
DECODED, MEASURED, CHECKED = 256, 128, 256
# A policy of at most so many updates with adapters stays near its reference (KL below compare's LOW_KL): it then reads
# the reference's draws, too (compare.frontier.cross).
NEAR = 50


@dataclass
class Work:
    """What one job does.

    Attributes:
        name: of the job.
        updates: optimizer steps.
        trained: tokens with gradients.
        read: tokens of passes without; a prompt that is answered is read, too.
        sampled: tokens decoded.
        steps: of decoding, each for all rows that are decoded at once.
        responses: texts sampled.
        loads: times that a model's weights are read or written.
        adapters: whether adapters are trained, not weights.
        known: whether the number of examples is known; else the data must be read first.
        ranks: that share the work.
        beside: parts of what is summed up above, which ``processes`` of this machine take from each other, one at a
            time; on CPUs only.
        requests: to judges that are language models, kept replies not taken off.
        longest: whether the lengths of its texts are the longest that may be, for nobody knows them yet.
    """

    name: str
    updates: int | None = None
    trained: float = 0.0
    read: float = 0.0
    sampled: float = 0.0
    steps: float = 0.0
    responses: int = 0
    loads: int = 0
    adapters: bool = False
    known: bool = True
    ranks: int = 1
    beside: list["Work"] = field(default_factory=list)
    processes: int = 1
    longest: bool = False
    requests: int = 0

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.trained + self.read + self.sampled

    @property
    def at_most(self) -> bool:
        """Whether its tokens, and what follows from them, are a bound: answers are counted at their full length."""
        return bool(self.tokens) and (self.longest or self.responses > 0)

    def seconds(self, speed: dict[str, Any]) -> float | None:
        """On this machine (`measured.ask`); ``None`` where the work is not known.

        A process starts (twice the imports: arguments, data and a Trainer are made, results are written), weights are
        loaded, and ranks share the tokens.
        """
        if not self.known:
            return None
        fixed = (2 if self.updates else 1) * speed["start"] + self.loads * 4 * speed["parameters"] / LOADED
        return fixed + self._passes(speed) - self._saved(speed)

    def _passes(self, speed: dict[str, Any]) -> float:
        trained = self.trained * speed["train"] * (ADAPTERS if self.adapters else 1.0)
        tokens = trained + self.read * speed["forward"] + self.sampled * speed["decode"]
        return tokens / self.ranks + self.steps * speed["step"]

    def _saved(self, speed: dict[str, Any]) -> float:
        """Seconds in which two of the parts are worked on: they take as long as the longest, or all shared evenly."""
        if self.processes < 2 or not self.beside or speed.get("device", "cpu") != "cpu":
            return 0.0
        parts = [one._passes(speed) for one in self.beside]
        return sum(parts) - max(sum(parts) / self.processes, *parts)


def work_of(run: RunFolder, name: str, ratios: dict[str, float] | None = None) -> Work:
    """What a job does, from the configuration and what has been done.

    Args:
        run: its folder and configuration.
        name: of the job, ``"ppo,kl_coef=0.0"`` for a point of a sweep.
        ratios: characters of a token, and the template's tokens (`measured.ask`, ``characters``).
    """
    work = _work_of(run, name, ratios)
    # Prompts alone are read where answers are sampled.
    texts = {"pairs": ["ppo"], "compare": ["ppo", "dpo"]}.get(name.split(",")[0], [name.split(",")[0]])
    work.longest = any(at_their_longest(run, stage) for stage in texts)
    return work


def _work_of(run: RunFolder, name: str, ratios: dict[str, float] | None) -> Work:
    stage = name.split(",")[0]
    section = run.config.get(stage) or {}
    if stage in ("data", "pairs"):
        return _made(run, stage, ratios)
    if stage == "ppo":
        return _ppo(run, name, section, ratios)
    if stage == "compare":
        return _compare(run, section, ratios)
    if section.get("skip_training"):
        return Work(name, updates=0)
    rows, length = examples(run, stage, ratios)
    sides = 1 if stage == "sft" else 2
    batch = int(section.get("per_device_train_batch_size") or BATCH)
    batch *= int(section.get("gradient_accumulation_steps") or 1) * ranks(run)
    steps = int(section.get("max_steps") or -1)
    given = bool(section.get("path"))
    if steps <= 0 and rows is None and not given:
        return Work(name, known=False)
    if given:
        steps = 0
    elif steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * float(section.get("num_train_epochs") or EPOCHS))
    length = min(length, int(section.get("max_length") or length))
    trained = steps * batch * sides * length
    # DPO reads every pair that it trains on once under the reference.
    read = min(rows or steps * batch, steps * batch) * sides * length if stage == "dpo" else 0.0
    # At the end both sides of the test pairs, by the reward model also of as many training pairs, by DPO's two models.
    tests = min(int(section.get("test_pairs") or 1000), test_pairs(run) or 1000)
    read += 4 * tests * length if stage != "sft" else 0.0
    work = Work(name, steps, trained, read, loads=2, adapters=bool(section.get("lora")), ranks=ranks(run))
    if stage == "reward_model":
        work.updates, work.trained = (int(section.get("ensemble") or 1) * one for one in (steps, trained))
        # Samples that its scores are centred on: drawn by the SFT policy, read by itself.
        new = int(section.get("sample_max_new_tokens") or 64)
        prompt = examples(run, "ppo", ratios)[1]
        work.responses = int(section.get("samples") or 0)
        _decode(work, work.responses, new, prompt, int(section.get("scoring_batch_size") or DECODED), 1)
        work.read += work.responses * (prompt + new)
        work.loads += 2
    return work


def _decode(work: Work, rows: int, new: int, prompt: int, at_once: int, among: int) -> None:
    """Add what decoding takes: each prompt is read, then all rows of a batch get a token a step."""
    work.sampled += rows * new
    work.read += rows * prompt
    work.steps += math.ceil(rows / among / max(at_once, 1)) * new


def _made(run: RunFolder, stage: str, ratios: dict[str, float] | None) -> Work:
    pairs, work = run.config.data.get("pairs"), Work(stage)
    new = run.config.data.get("max_new_tokens")
    if stage == "pairs" and isinstance(pairs, int) and new:
        work.responses, work.loads = 2 * (pairs + int(run.config.data.get("test_pairs") or 0)), 1
        _decode(work, work.responses, int(new), examples(run, "ppo", ratios)[1], DECODED, 1)
    return work


def _ppo(run: RunFolder, name: str, section: Any, ratios: dict[str, float] | None) -> Work:
    point = next((one for one in points_of(run.config, "ppo") if point_name("ppo", one) == name), {})
    section = {**section, **point}
    batch = int(section.get("per_device_train_batch_size") or BATCH)
    rollout = section.get("rollout_batch_size") or batch * int(section.get("gradient_accumulation_steps") or 1)
    rollout = int(rollout) if section.get("rollout_batch_size") else int(rollout) * ranks(run)
    updates = int(section.get("max_steps") or -1)
    if updates <= 0:
        episodes = section.get("total_episodes")
        if not episodes:
            return Work(name, known=False)
        updates = math.ceil(int(episodes) / rollout)
    response = int(section.get("response_length") or 53)
    prompt = min(examples(run, "ppo", ratios)[1], int(section.get("max_prompt_length") or 10**9))
    tokens = updates * rollout * (prompt + response)
    # Policy and value model (where there is one) are trained on each pass; they, reference and reward read once.
    values, rewards = trains_values(section), reward_models(run.config)
    trained = (1.0 + values) * trained_share(section) * tokens * int(section.get("num_ppo_epochs") or 4)
    work = Work(name, updates, trained, (2.0 + values + rewards) * tokens, adapters=bool(section.get("lora")))
    work.ranks, work.responses, work.loads = ranks(run), updates * rollout, 3 + values + rewards
    for _ in range(updates):
        _decode(work, rollout, response, prompt, DECODED, work.ranks)
    if section.get("eval_strategy") not in (None, "no", False):
        times = math.ceil(updates / max(int(section.get("eval_steps") or 1), 1))
        asked = int(section.get("validation_prompts") or 0)
        for _ in range(times):
            _decode(work, asked, response, prompt, DECODED, work.ranks)
        work.responses += times * asked
        work.read += (2.0 + rewards) * times * asked * (prompt + response)
    return work


# ---------------------------------------------------------------------------------------------------- compare's passes


@dataclass(frozen=True)
class Drawn:
    """What compare draws from one policy for every prompt (compare.sampling.completions.plan).

    Attributes:
        batches: draws a prompt, a batch of decoding for each role and temperature.
        read: draws a prompt that are read for their KL.
        models: that read them: the reference's own are read once, others by policy and reference.
        checkpoint: a point along training.
    """

    batches: tuple[int, ...]
    read: int
    models: int
    checkpoint: bool = False


def drawn(config: Any) -> Iterator[Drawn]:
    """Policy by policy, the reference first; not those whose answers are in a file."""
    section = config.compare
    pool, samples = int(section.get("pool_size") or 0), int(section.get("samples") or 1)
    baseline = int(section.get("baseline_draws") or 4)
    main = section.get("temperature") or 1.0
    others = [one for one in section.get("other_temperatures") or [] if one != main]
    warm = sum(one > 0 for one in others)
    if "given" not in config or config.model.get("path"):
        yield Drawn((baseline, *([pool] if pool else []), *(1 for _ in others)), baseline + warm, 1)
    best = {key: 2 * max(values) for key, values in (section.get("best_of") or {}).items() if values}
    names = ["ppo", "dpo"] if "given" not in config else []
    names += [key for key, one in (section.get("policies") or {}).items() if (one or {}).get("path")]
    for stage in ("ppo", "dpo") if names[:2] == ["ppo", "dpo"] else ():
        names += [point_name(stage, point) for point in points_of(config, stage)]
        steps = (section.get("checkpoints") or {}).get(stage)
        if steps == "all":
            steps = range(int((config.get(stage) or {}).get("save_total_limit") or 1))
        for _ in steps or ():
            yield Drawn((samples,), samples, 2, checkpoint=True)
    for name in names:
        own = [samples, *([best[name]] if name in best else [])]
        yield Drawn((*own, *(1 for _ in others)), sum(own) + warm, 2)


def _compare(run: RunFolder, section: Any, ratios: dict[str, float] | None) -> Work:
    """Every policy draws; what it drew is read by it and the reference (KL), by each judge that is a model, and in
    parts by other policies (mixtures, best-of-n); each policy reads held-out pairs, and so does each judge.
    """
    prompts, new = int(section.get("n_prompts") or 512), int(section.get("max_new_tokens") or 64)
    if isinstance(held := run.config.data.get("heldout_prompts"), int):
        prompts = min(prompts, held)
    table = run.path("data", "prompts_heldout.parquet")
    if table.is_file():
        prompts = min(prompts, rows_of(table))
    prompt = examples(run, "ppo", ratios)[1]
    length, pair = prompt + new, examples(run, "dpo", ratios)[1]
    at_once = int(section.get("batch_size") or 512)
    judges = reward_models(run.config) if run.config.get("reward_model") else 0
    judges += sum((one or {}).get("kind") == "reward_model" for one in section.get("judges") or [])
    pairs = 0 if "given" in run.config else test_pairs(run)
    pairs = 10**9 if pairs is None else pairs
    work, policies = Work("compare", ranks=ranks(run)), list(drawn(run.config))
    # Policies draw, and rows are scored, in forked processes (models.sampling.forked.may_fork).
    if work.ranks == 1 and int(run.config.launch.threads) == 1:
        work.processes = min(int(section.get("workers") or 1), os.cpu_count() or 1)
    for one in policies:
        own = Work("compare", ranks=work.ranks)
        for draws in one.batches:
            _decode(own, prompts * draws, new, prompt, at_once, work.ranks)
        own.read += prompts * one.read * one.models * length
        own.read += 0 if one.checkpoint else 2 * min(MEASURED, pairs) * pair
        work.responses += prompts * sum(one.batches)
        work.beside.append(own)
    scored = judges * (work.responses * length + 2 * min(CHECKED, pairs) * pair)
    work.beside += [Work("compare", read=scored / work.processes) for _ in range(work.processes)]
    for own in work.beside:
        work.read, work.sampled, work.steps = work.read + own.read, work.sampled + own.sampled, work.steps + own.steps
    # Best-of-n's choices by the reference; the two main policies' draws, and two of a sweep, by each other.
    samples = int(section.get("samples") or 1)
    swept = any((run.config.get(stage) or {}).get("sweep") for stage in ("ppo", "dpo"))
    near = sum(_stays_near(run.config.get(stage)) for stage in ("ppo", "dpo") if run.config.get(stage))
    again = len(section.get("best_of_n") or []) + samples * (2 + 2 * swept)
    again += (near * sum(policies[0].batches[:2]) + int(section.get("pool_size") or 0)) if near else 0
    work.read += prompts * again * length if policies else 0
    work.requests = _asked(run, section, prompts)
    work.loads = len(policies) + judges + 2 + near
    if select := section.get("select"):
        # Every setting draws on validation prompts first; what it drew is read for its KL, and by the judge.
        responses = int(select.get("prompts") or VALIDATION_PROMPTS) * samples
        for _ in policies[1:]:
            _decode(work, responses, new, prompt, at_once, work.ranks)
        work.read += (len(policies) - 1) * responses * (2 + (select.get("by") != "gold")) * length
        work.responses += (len(policies) - 1) * responses
        work.loads += len(policies)
    return work


def _asked(run: RunFolder, section: Any, prompts: int) -> int:
    """Both orders of every pair of main policies (`compare.estimates.judgements.main_pairs`), for each LLM judge."""
    policies = 1 + (0 if "given" in run.config else 2 + bool(section.get("best_of_n")))
    policies += len(section.get("policies") or {})
    asked = 0
    for judge in section.get("judges") or []:
        if (judge or {}).get("kind") == "llm":
            pairs = len(judge.get("pairs") or []) or math.comb(policies, 2)
            compared = pairs * min(prompts, int(judge.get("n_prompts") or prompts))
            compared += int(section.get("check_pairs") or 0)
            asked += 2 * compared * int(judge.get("repeats") or 1)
    return asked


def _stays_near(section: Any) -> bool:
    return bool(section.get("lora")) and 0 < int(section.get("max_steps") or -1) <= NEAR
