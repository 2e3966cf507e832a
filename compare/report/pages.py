"""``report.json``, ``report.html`` (one file, no network), ``report.md`` and ``figures/`` from the same figures."""

import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import printable
from ppo_vs_dpo.artifacts.files import finite, write_json, write_text
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.config import METHODS
from ppo_vs_dpo.compare.report.decision import head_to_head, main_judge
from ppo_vs_dpo.compare.report.plots import (
    TITLES,
    compute_plot,
    element_of,
    frontier_plot,
    shown_rewards,
    svg_of,
    write_figure,
)
from ppo_vs_dpo.compare.report.verdict import label, names_of, nats, p_text, percent
from ppo_vs_dpo.compare.sampling.contenders import Contender, shown_columns
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Prompts

TEMPLATES = Path(__file__).parent / "templates"
# Characters of a prompt or completion kept in the page; the whole text is in completions.parquet.
LONGEST_TEXT = 4000


@functools.cache
def environment(escaped: bool = True) -> jinja2.Environment:
    """Jinja with everything escaped that does not say it is markup; its templates are compiled once a process."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(percent=percent, label=label, number=number, interval=interval, nats=nats)
    made.filters |= {"nats_interval": nats_interval, "p_text": p_text}
    made.filters.update(duration=duration, si=si)
    return made


def number(value: float | None, digits: int = 2) -> str:
    """A number with a real minus sign, or a dash where there is none; what rounds to zero has no sign."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def interval(ci: list[float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """``[0.40, 0.62]``, or nothing."""
    if ci is None or ci[0] is None:
        return ""
    return f"[{number(ci[0] * scale, digits)}, {number(ci[1] * scale, digits)}]"


def nats_interval(ci: list[float] | None) -> str:
    """``[0.0021, 0.0043]``: the ends of a KL's interval with the digits they need."""
    return "" if ci is None or ci[0] is None else f"[{nats(ci[0])}, {nats(ci[1])}]"


def duration(seconds: float | None) -> str:
    """``43 s``, ``1:43 min``, ``2:05 h``."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    unit, whole = ("min", seconds) if seconds < 6000 else ("h", seconds / 60)
    minutes, rest = divmod(round(whole), 60)
    return f"{minutes}:{rest:02d} {unit}"


def si(value: float | None, unit: str = "") -> str:
    """``3.2 T`` with an SI prefix and three digits."""
    if value is None:
        return "–"
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


STAGE_NAMES = {"sft": "SFT", "reward_model": "reward model", "ppo": "PPO", "dpo": "DPO"}
COSTS = ("seconds", "cpu_seconds", "peak_memory_mb", "gpu_peak_memory_mb", "tokens_generated", "flops")
METHOD_NAMES = {**METHODS, "best_of_n": "best-of-n"}


def cost_rows(cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of costs: every stage, then every method with all it needs after SFT.

    The comparison is among them up to its report: its own end comes after that.
    """
    rows = [{"name": STAGE_NAMES[stage], "kind": "stage", **spent} for stage, spent in cost.get("stages", {}).items()]
    here = {key: cost[f"compare_{key}"] for key in COSTS if f"compare_{key}" in cost}
    if here:
        rows.append({"name": "comparison", "needs": "until this page was written", "kind": "stage", **here})
    for method, spent in cost.get("methods", {}).items():
        needs = " + ".join(STAGE_NAMES[stage] for stage in spent["stages"])
        rows.append({"name": f"{METHOD_NAMES[method]} in all", "needs": needs, "kind": "method", **spent})
    for method, spent in cost.get("tuned", {}).items():
        needs = f"all {spent['settings']:.0f} settings, chosen among"
        rows.append({"name": f"{METHOD_NAMES[method]}, tuned", "needs": needs, "kind": "method", **spent})
    return [{**dict.fromkeys(COSTS), "needs": "", **row} for row in rows]


def json_for_script(value: Any) -> Markup:
    """JSON that may stand inside a ``<script>`` element whatever texts it holds."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@part("report")
def write_report(
    folder: Path, report: dict[str, Any], contenders: list[Contender], prompts: Prompts, title: str
) -> None:
    """Write all four forms of the report."""
    with names_of(report):
        samples = sample_table(contenders, prompts, list(report["judges"]))
    write_pages(folder, report, samples, title)


def write_pages(folder: Path, report: dict[str, Any], samples: dict[str, Any], title: str) -> None:
    """Write ``report.json``, ``figures/``, ``report.md`` and ``report.html``."""
    with names_of(report):
        _write_pages(folder, report, samples, title)


def _write_pages(folder: Path, report: dict[str, Any], samples: dict[str, Any], title: str) -> None:
    write_json(folder / "report.json", report)
    charts = []
    keys = shown_rewards(report)
    if keys:
        whole = write_figure(frontier_plot(report), folder / "figures", "frontier")
        # One element for each reward: side by side on a desk, one under the other on a phone.
        for key in keys:
            panel = svg_of(frontier_plot(report, [key])) if len(keys) > 1 else whole
            says = f"{TITLES[key]} against the square root of the KL to SFT, every policy a point"
            charts.append(Markup(element_of(panel, says, key)))
    compute, spent = "", compute_plot(report)
    if spent is not None:
        drawn = write_figure(spent, folder / "figures", "compute")
        compute = Markup(element_of(drawn, "Reward against what was spent, a line or points a method", "compute"))
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, samples, charts, title, compute))


def spent_on(report: dict[str, Any]) -> str | None:
    """What all settings of each method took, the choice included: measured, so it differs between equal runs."""
    tuned = (report.get("cost") or {}).get("tuned")
    if not tuned:
        return None
    parts = []
    for name, one in tuned.items():
        figures = [f"{one['seconds']:,.0f} s"] if one.get("seconds") else []
        figures += [f"{one['tokens_generated'] / 1e6:.2f} M tokens sampled"] if one.get("tokens_generated") else []
        figures += [f"{one['flops'] / 1e12:,.3g} TFLOPs"] if one.get("flops") else []
        parts.append(f"{label(name)} {', '.join(figures)}")
    return f"In all, every setting and the choice included, after SFT and the pairs: {'; '.join(parts)}."


def render_html(
    report: dict[str, Any], samples: dict[str, Any], charts: list[Markup], title: str = "", compute: str = ""
) -> str:
    """The self-contained page."""
    judge = main_judge(report)
    policies = report["policies"].values()
    template = environment().get_template("report.html.j2")
    return template.render(
        report=finite(report),
        title=title or "a comparison",
        head_to_head=" against ".join(map(label, head_to_head(report))),
        first_judge=judge,
        trained=trained_lines(report),
        has_gold=any(policy["gold_reward"] is not None for policy in policies),
        has_proxy=any(policy["proxy_reward"] is not None for policy in policies),
        over={point["policy"] for point in report["frontier"] if point.get("over_optimised")},
        against_sft={e["policy"]: e for e in report["win_rates"] if e["versus"] == REFERENCE and e["judge"] == judge},
        reweighted=any(entry.get("test") == "reweighted" for entry in report["win_rates"]),
        n_pairs=sum(e["judge"] == judge and e["policy"] != e["versus"] for e in report["win_rates"]) // 2,
        ranking=report["ranking"].get(judge, {}).get("entries", []),
        cost=cost_rows(report["cost"]),
        has_gpu=any(spent.get("gpu_peak_memory_mb") for spent in report["cost"].get("stages", {}).values()),
        optimum=report.get("optimum"),
        matrices=json_for_script(matrices(report)),
        samples=json_for_script(samples),
        charts=charts,
        compute=compute,
        spent=spent_on(report),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


# What a reader must know of each stage to say what its policy is: of its section, and of its last word.
TOLD = {
    "sft": (("learning_rate",), ("steps",)),
    "reward_model": (("path", "learning_rate"), ("steps",)),
    "ppo": (("loss", "advantage", "kl_coef", "learning_rate", "reward"), ("updates", "episodes")),
    "dpo": (("beta", "loss_type", "learning_rate"), ("steps",)),
}


def trained(run: RunFolder) -> dict[str, Any]:
    """Model, data and the main coefficients of a run."""
    config = OmegaConf.to_container(run.config, resolve=True)
    model, data = config.get("model") or {}, config.get("data") or {}
    found: dict[str, Any] = {
        "model": _told(model.get("path") or (model.get("architecture") or {}).get("model_type")),
        "data": _told(data.get("path") or data.get("prompts_path") or data.get("source")),
        "pairs": ((run.done("pairs") or {}).get("figures") or {}).get("pair_set", {}).get("n_train"),
    }
    for stage, (keys, counts) in TOLD.items():
        section, done = config.get(stage) or {}, (run.done(stage) or {}).get("figures") or {}
        usual = (None, [], "gae", "ppo", "reward_model", ["sigmoid"], "sigmoid")
        told = {key: _told(section[key]) for key in keys if section.get(key) not in usual}
        told |= {key: done[key] for key in counts if isinstance(done.get(key), int)}
        if done and any(key in told for key in counts):
            found[stage] = told
    return {key: value for key, value in found.items() if value is not None}


def _told(value: Any) -> Any:
    """A path of this machine says nothing to others: its name does."""
    if isinstance(value, list):
        return " + ".join(str(_told(one)) for one in value)
    return Path(value).name if isinstance(value, str) and (Path(value).exists() or value.startswith("/")) else value


def trained_lines(report: dict[str, Any]) -> list[str]:
    """What was trained on what, for whoever gets the report from somebody else."""
    about = report.get("trained") or {}
    found = [f"{key} {about[key]}" for key in ("model", "data") if about.get(key)]
    if about.get("pairs"):
        found.append(f"{about['pairs']:,} pairs")
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        figures = [f"{key.replace('_', ' ')} {value}" for key, value in (about.get(stage) or {}).items()]
        if figures:
            found.append(f"{STAGE_NAMES[stage]}: {', '.join(figures)}")
    return found


def render_markdown(report: dict[str, Any]) -> str:
    """The page for a README or a model card."""
    text = (
        environment(escaped=False)
        .get_template("report.md.j2")
        .render(report=finite(report), judge=main_judge(report), trained=trained_lines(report), spent=spent_on(report))
    )
    return printable(text)  # names and sentences are data, and this page is read on terminals


def matrices(report: dict[str, Any]) -> dict[str, Any]:
    """Win rates by judge as the page's matrix reads them."""
    judges: dict[str, Any] = {}
    for entry in report["win_rates"]:
        controlled = entry.get("length_controlled") or {"win_rate": None, "ci": None}
        judges.setdefault(entry["judge"], {}).setdefault(entry["policy"], {})[entry["versus"]] = {
            "wr": entry["win_rate"],
            "ci": entry["ci"],
            "lc": controlled["win_rate"],
            "lc_ci": controlled["ci"],
            "p": entry.get("p_holm"),
            "ties": entry["ties"],
            "family": entry.get("family"),
            "allowed": (entry.get("allowed") or {}).get("at_most"),
            "raw": {"wr": entry["raw"]["win_rate"]} if entry.get("raw") else None,
        }
    names = list(report["policies"])
    return {
        "first": main_judge(report),
        "alpha": 1 - report["settings"]["confidence"],
        "judges": judges,
        "names": names,
        "labels": {name: label(name) for name in names},
    }


def sample_table(contenders: list[Contender], prompts: Prompts, judges: list[str]) -> dict[str, Any]:
    """One completion of every contender on every prompt, with its scores, for reading side by side.

    The first draw; for best-of-n the best of the first n of the pool.
    """
    policies = []
    rows = np.arange(len(prompts))
    for contender in contenders:
        draws = contender.draws
        per = draws.shape[1]
        columns = shown_columns(contender)
        policies.append(
            {
                "name": contender.name,
                "label": label(contender.name),
                "texts": [draws.texts[row * per + column][:LONGEST_TEXT] for row, column in enumerate(columns)],
                "tokens": draws.tokens[rows, columns].tolist(),
                "finished": draws.finished[rows, columns].astype(int).tolist(),
                "scores": {
                    judge: np.round(draws.scores[judge][rows, columns], 4).tolist()
                    for judge in judges
                    if judge in draws.scores
                },
            }
        )
    texts = [
        prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        for prompt in prompts.prompts
    ]
    return {
        "prompts": [text[:LONGEST_TEXT] for text in texts],
        "ids": prompts.ids,
        "judges": [judge for judge in judges if policies and judge in policies[0]["scores"]],
        "policies": policies,
    }
