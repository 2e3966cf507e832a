"""The stage ``compare``: completions, judges, win rates, KL, frontier, one report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import Complaint, UserError
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.artifacts.guards.versions import differences, made_by
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.artifacts.run import STAGES
from ppo_vs_dpo.artifacts.settings import nearest, split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.config import METHODS, REWARD_MODEL_FIGURES, VALIDATION_PROMPTS, CompareStage
from ppo_vs_dpo.compare.estimates.judgements import (
    comparisons_of,
    make_judges,
    pair_comparisons,
    split_pairs,
    table_of,
)
from ppo_vs_dpo.compare.estimates.length_control import support_notes
from ppo_vs_dpo.compare.estimates.win_rates import Settings, judge_pairs
from ppo_vs_dpo.compare.frontier.cross import cross_logprobs
from ppo_vs_dpo.compare.frontier.gaps import Enumerated, enumerate_policies, optimal_figures
from ppo_vs_dpo.compare.frontier.selected import Selection, choose, tuning_of
from ppo_vs_dpo.compare.judges.noise import add_corrections, self_disagreement
from ppo_vs_dpo.compare.report.assemble import best_of_n_logprobs, figures
from ppo_vs_dpo.compare.report.cost import cost
from ppo_vs_dpo.compare.report.decision import decide
from ppo_vs_dpo.compare.report.pages import trained, write_report
from ppo_vs_dpo.compare.report.tables import write_completions, write_judgements
from ppo_vs_dpo.compare.report.verdict import sentences, warnings, would_change
from ppo_vs_dpo.compare.sampling.completions import Draws, split_draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, along_training, contenders_of
from ppo_vs_dpo.compare.sampling.gather import Gatherer, heldout_accuracy, score_all
from ppo_vs_dpo.compare.sampling.policies import (
    REFERENCE,
    Policy,
    Prompts,
    check_pair_set,
    heldout_prompts,
    is_given,
    policies_of,
    unmeasured,
)
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.models.sharding.deepspeed import held_bytes, named_step, tell_held_bytes
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.judging.llm import Comparison, Judgement, LLMJudge

# Version of report.json; docs/compare.md describes the fields.
SCHEMA_VERSION = 2


def run_compare(context: StageContext) -> None:
    """Compare all policies of a run; writes ``compare/``.

    Raises:
        UserError: whatever makes the comparison meaningless; or a judge's endpoint went down, after the report of all
            that is known was written.
    """
    settings, _ = split(context.config, CompareStage, where="compare")
    check_settings(settings)
    # 1. The same pairs in both branches, and prompts that nobody was trained on.
    pair_set = check_pair_set(context.run)
    prompts = heldout_prompts(context.run, settings.n_prompts, settings.near_duplicate)
    policies, notes = policies_of(context.run, settings)
    check_best_of(settings, policies)
    if prompts.trained_on:
        notes.append(f"{prompts.trained_on} held-out prompts had been trained on in this run and were left out.")
    if prompts.repeated:
        notes.append(f"{prompts.repeated} held-out prompts stood there twice and count once.")
    # 2. and 3. What takes models; under a launcher all ranks do it together, the rest is the main process's.
    found = ask_models(context, settings, prompts, policies)
    if found is None:
        return
    scoring, reading, draws, contenders = found.scoring, found.reading, found.draws, found.contenders
    notes += unmeasured(policies, found.learned)
    if selection := found.selection:
        wanted = selection.prompts < (settings.select or {}).get("prompts", VALIDATION_PROMPTS)
        notes += [f"There were only {selection.prompts} validation prompts to choose by."] if wanted else []
    notes += of_several_versions(context)
    if not found.has_model:
        notes.append("No model was named: lengths are in words, not in tokens, and there is no KL.")
    checkpoints = found.checkpoints
    if (settings.best_of_n or settings.best_of) and PROXY not in {judge.name for judge in scoring}:
        notes.append("There is no reward model, so nothing selects among samples: best-of-n is left out.")
    # 4. Judges that read see one completion of each policy, in both orders.
    scored = {judge.name: judge_pairs(contenders, judge.name) for judge in scoring}
    read: list[Judgement] = []
    tables = dict(scored)
    judges: dict[str, dict[str, Any]] = {
        j.name: {**j.identity(), "in_sample": j.in_sample, "heldout": found.checked[j.name]} for j in scoring
    }
    stopped: list[str] = []
    for judge in reading:
        on_pairs = pair_comparisons(found.pairs, settings.check_pairs)
        verdicts, why = ask(context, judge, contenders, prompts, on_pairs)
        verdicts, checked = split_pairs(verdicts)
        table, known = table_of(verdicts, prompts)
        known |= {"heldout": checked} if on_pairs else {}
        again = self_disagreement(verdicts, judge.config.repeats)
        known |= {"self_disagreement": again} if again else {}
        judges[judge.name] = {**judge.identity(), "in_sample": False, **known}
        read += verdicts
        tables |= {judge.name: table} if table is not None else {}
        notes += reading_notes(judge, known, why)
        stopped += [why] if why else []
    # 5. Figures.
    how = Settings(settings.resamples, context.seed, settings.confidence, prompts.clusters)
    report = {
        "schema_version": SCHEMA_VERSION,
        "verdict": [],
        "would_change": [],
        "warnings": [],
        "settings": {
            "seeds": [context.seed],
            **vars(settings),
            "n_prompts": len(prompts),
            "units": prompts.units,
            "near_training": prompts.near_training,
            "tuning": selection.tuning() if selection else tuning_of(settings, policies),
        },
        "pair_set": pair_set,
        "trained": None if is_given(context.run) else trained(context.run),
        "judges": judges,
        "names": {REFERENCE: context.run.config.given.shown} if is_given(context.run) else {},
        **figures(
            contenders,
            checkpoints,
            draws,
            scored,
            tables,
            found.logprobs,
            settings,
            how,
            found.learned,
            prompts.answers,
        ),
        "optimum": optimal_figures(contenders, draws, scoring, found.enumerated, context.run, settings, how),
        "reward_model": reward_model_figures(context),
    }
    report["settings"].pop("workers")
    for judge in reading:
        own = [one for one in read if one.judge == judge.name]
        add_corrections(
            report["win_rates"], judge.name, [own], confidence=settings.confidence, unit_of=[prompts.unit_of()]
        )
    report["decision"] = decide(report)
    report["warnings"] = notes + warnings(report) + support_notes(report["win_rates"])
    report["verdict"] = sentences(report)
    report["would_change"] = would_change(report)
    points = {point["policy"]: point for point in report["frontier"]} | report["policies"]
    report["cost"] = cost(context, found.learned, selection, points)
    report["cost"]["judges"] = {judge.name: judge.counted() for judge in reading}
    # 6. Files.
    context.progress(97, 100, "report")
    write_completions(context.dir / "completions.parquet", draws, prompts)
    write_judgements(context.dir / "judgements.parquet", scored, read, prompts)
    write_report(context.dir, report, contenders, prompts, context.run.root.name)
    if stopped:
        raise UserError(
            f"{stopped[0]}. All replies so far are kept, and {context.dir / 'report.html'} shows what they say; "
            f"start the same command again to ask for the rest."
        )
    context.finish(
        verdict=report["verdict"],
        n_prompts=len(prompts),
        pair_set=pair_set and pair_set["hash"],
        warnings=pair_set["differences"] if pair_set else [],
    )


@dataclass(frozen=True)
class Asked:
    """What the models of a run said.

    Attributes:
        scoring: judges that score; they have scored every completion.
        reading: judges that read; not asked yet.
        draws: all completions, with scores.
        learned: policy -> what was learned while its completions were drawn.
        contenders: the policies at the main temperature.
        checkpoints: points of the frontier only: along training, and settings beside the chosen ones.
        selection: how each method's point was chosen, where `compare.select` asks for it.
        logprobs: of what best-of-n selects.
        enumerated: all completions that there are, where they are few.
        has_model: whether a reference model is known; else there are outputs only.
        checked: judge that scores -> on how many held-out pairs it is right.
        pairs: held-out pairs.
    """

    scoring: list[Any]
    reading: list[LLMJudge]
    draws: list[Draws]
    learned: dict[str, dict[str, Any]]
    contenders: list[Contender]
    checkpoints: list[Contender]
    selection: Selection | None
    logprobs: dict[str, np.ndarray]
    enumerated: Enumerated | None
    has_model: bool
    checked: dict[str, dict[str, int]]
    pairs: Sequence[dict[str, Any]]


def ask_models(
    context: StageContext, settings: CompareStage, prompts: Prompts, policies: list[Policy]
) -> Asked | None:
    """Everything that takes a model, on all ranks together; ``None`` on those that are done with it.

    The main process goes on alone: a judge that reads may take longer than ranks wait for each other.
    """
    config = model_settings(context)
    ranks = Ranks.join(context, config, context.run.stage_dir(REFERENCE) / "model")
    with named_step(lambda: f"compare, {ranks.step}"), ranks.computing(config):
        scoring, reading = make_judges(context, settings.judges, ranks)
        for judge in scoring:
            if judge.heavy:
                judge.check_context(prompts.prompts, settings.max_new_tokens)
        # Each method's point first, on prompts of its own.
        selection = (
            choose(context, settings, policies, prompts, (scoring, reading), ranks) if settings.select else None
        )
        if selection:
            policies, settings = selection.apply(policies, settings)
        # 2. Completions of every policy, with their KL to the reference.
        gatherer = Gatherer(context, settings, prompts, ranks)
        with part("sampling"):
            gathered = gatherer.all(policies)
        draws = [one for table, _ in gathered for one in split_draws(table, len(prompts))]
        # 3. Judges that score see every completion.
        for number, judge in enumerate(scoring):
            with part("scoring"):
                score_all(judge, draws, prompts, settings.workers, ranks)
            context.progress(80 + 5 * (number + 1) / len(scoring), 100, f"judged by {judge.name}")
        pairs = gatherer.reference.pairs if gatherer.has_model else ()
        checked = {judge.name: heldout_accuracy(judge, pairs, settings.workers, ranks) for judge in scoring}
        contenders = contenders_of(policies, draws, settings)
        checkpoints = along_training(policies, draws, settings)
        if selection:
            contenders, checkpoints = selection.name_all(contenders, checkpoints)
        logprobs = best_of_n_logprobs(contenders, draws, gatherer)
        beside = [one for one in checkpoints if "step" not in one.point]
        cross_logprobs([*contenders, *beside], policies, draws, gatherer)
        enumerated = enumerate_policies(contenders, policies, scoring, gatherer, settings)
        if ranks.settings is not None and gatherer.has_model:
            held = {judge.name: held_bytes(judge.frozen.model) for judge in scoring if judge.heavy}
            tell_held_bytes(ranks.rank, {"reference": held_bytes(gatherer.reference.model), **held})
        if not ranks.leave():
            return None
    learned = {policy.name: extra for policy, (_, extra) in zip(policies, gathered, strict=True)}
    return Asked(
        scoring=scoring,
        reading=reading,
        draws=draws,
        learned=learned,
        contenders=contenders,
        checkpoints=checkpoints,
        selection=selection,
        logprobs=logprobs,
        enumerated=enumerated,
        has_model=gatherer.has_model,
        checked=checked,
        pairs=pairs,
    )


def check_settings(settings: CompareStage) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        UserError: all of them at once.
    """
    if problems := settings.problems():
        raise Complaint(problems)


def check_best_of(settings: CompareStage, policies: list[Policy]) -> None:
    """Refuse best-of-n over policies that cannot be sampled.

    Raises:
        UserError: an unknown policy, or one whose completions were made elsewhere.
    """
    models = [p.name for p in policies if p.model is not None and p.name != REFERENCE and not p.checkpoint]
    if settings.select:
        models = list(dict.fromkeys(p.method if p.method in METHODS else p.name for p in policies if p.name in models))
    for name in settings.best_of:
        if name not in models:
            raise UserError(
                f"compare.best_of.{name}: no policy of this run that can be sampled.{nearest(name, models)}"
            )


def ask(
    context: StageContext,
    judge: LLMJudge,
    contenders: list[Contender],
    prompts: Prompts,
    on_pairs: list[Comparison],
) -> tuple[list[Judgement], str | None]:
    """All verdicts of a judge that reads, of held-out pairs too, and why it stopped early."""
    comparisons = comparisons_of(judge, contenders, prompts) + on_pairs
    estimate = judge.estimate(comparisons)
    note = f"{judge.name}: {estimate['requests']:.0f} requests"
    if estimate["cost"]:
        note += f", at most {estimate['cost']:.2f}"
    context.progress(85, 100, note)
    return judge.judge(comparisons, lambda done, total: context.progress(85 + 12 * done / total, 100, note))


def of_several_versions(context: StageContext) -> list[str]:
    """A warning where the stages of a run were not all made by the same code and libraries; names both."""
    found: dict[str, list[str]] = {}
    for name in [
        *(stage for stage in STAGES if stage != "compare"),
        *context.run.points("dpo"),
        *context.run.points("ppo"),
    ]:
        for made in context.run.made_by(name):
            for difference in differences(made, made_by()):
                found.setdefault(difference, []).append(name)
    return [
        f"Not all of this run was made by the code that compares it: {', '.join(dict.fromkeys(names))}: {difference}."
        for difference, names in found.items()
    ]


def reading_notes(judge: LLMJudge, known: dict[str, Any], stopped: str | None) -> list[str]:
    """Warnings about one judge that reads."""
    notes = []
    if stopped:
        notes.append(
            f"The judge {judge.name} stopped early: {stopped}. Its figures are of what it had judged by then."
        )
    if known["excluded"]:
        total = known["excluded"] + known["judged"]
        refused, cut = known.get("refused", 0), known.get("cut_off", 0)
        of_these = [f"{refused} were refused by its endpoint ({judge.refusal})"] if refused else []
        if cut:
            of_these.append(
                f"{cut} replies were cut off at {judge.budget} tokens (raise max_completion_tokens, or the template's "
                f"max_tokens)"
            )
        notes.append(
            f"The judge {judge.name} named no verdict for {known['excluded']} of {total} comparisons, after "
            f"{judge.config.reasks} further tries; they are left out, not guessed."
            + (f" Of these, {' and '.join(of_these)}." if of_these else "")
        )
    if without := judge.backend.dropped():
        notes.append(
            f"The judge {judge.name}: its endpoint does not know {', '.join(without)}, and was asked without."
        )
    if judge.cache.unreadable:
        notes.append(f"{judge.cache.unreadable} kept replies could not be read; what they answered was asked again.")
    again = known.get("self_disagreement")
    if again and again["rate"] is not None and again["rate"] > 0.1:
        notes.append(
            f"Asked again, the judge {judge.name} contradicts itself in {100 * again['rate']:.0f} % of cases: its win "
            f"rates are pulled towards 50 %. noise_corrected in report.json says what they are without that."
        )
    bias = known["position_bias"]["bias"]
    if bias is not None and abs(bias) > 0.2:
        side = "first" if bias > 0 else "second"
        notes.append(
            f"The judge {judge.name} goes by position: it leans to the {side} answer by {abs(bias):.2f} on a scale "
            f"of 1. Both orders were asked, so this costs power, not fairness."
        )
    return notes


def reward_model_figures(context: StageContext) -> dict[str, Any] | None:
    """Accuracy, ceiling, the share of it and calibration error of the reward model, from its own report."""
    path = context.run.stage_dir("reward_model") / "report.json"
    if not path.is_file():
        return None
    found = read_json(path)
    return {key: found.get(key) for key in REWARD_MODEL_FIGURES}
