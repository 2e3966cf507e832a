"""``report.json``, ``report.html`` (one file, no network), ``report.md`` and ``figures/`` from the same figures."""

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from artifacts.files import finite, write_json, write_text
from compare.contenders import Contender, realised_best
from compare.plots import frontier_plot, write_figure
from compare.policies import Prompts
from compare.verdict import label, main_judge, percent

TEMPLATES = Path(__file__).parent / "templates"
# Characters of a prompt or completion kept in the page; the whole text is in completions.parquet.
LONGEST_TEXT = 4000


def environment() -> jinja2.Environment:
    """Jinja with everything escaped that does not say it is markup."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html", "j2"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(percent=percent, label=label, number=number, interval=interval, nats=nats)
    return made


def number(value: float | None, digits: int = 2) -> str:
    """A number with a real minus sign, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def nats(value: float | None) -> str:
    """A KL in nats."""
    return number(value, 2)


def interval(ci: list[float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """``[0.40, 0.62]``, or nothing."""
    if ci is None or ci[0] is None:
        return ""
    return f"[{number(ci[0] * scale, digits)}, {number(ci[1] * scale, digits)}]"


def json_for_script(value: Any) -> Markup:
    """JSON that may stand inside a ``<script>`` element whatever texts it holds."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write_report(folder: Path, report: dict[str, Any], contenders: list[Contender], prompts: Prompts) -> None:
    """Write all four forms of the report."""
    samples = sample_table(contenders, prompts, list(report["judges"]))
    write_pages(folder, report, samples)


def write_pages(folder: Path, report: dict[str, Any], samples: dict[str, Any]) -> None:
    """Write ``report.json``, ``figures/``, ``report.md`` and ``report.html``."""
    write_json(folder / "report.json", report)
    charts = {}
    if report["frontier"]:
        figure = frontier_plot(report)
        charts["frontier"] = Markup(write_figure(figure, folder / "figures", "frontier"))
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report, samples, charts))


def render_html(report: dict[str, Any], samples: dict[str, Any], charts: dict[str, Markup]) -> str:
    """The self-contained page."""
    template = environment().get_template("report.html.j2")
    return template.render(
        report=finite(report),
        first_judge=main_judge(report),
        matrices=json_for_script(matrices(report)),
        samples=json_for_script(samples),
        charts=charts,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


def render_markdown(report: dict[str, Any]) -> str:
    """The page for a README or a model card."""
    made = environment()
    made.autoescape = False
    return made.get_template("report.md.j2").render(report=finite(report), judge=main_judge(report))


def matrices(report: dict[str, Any]) -> dict[str, Any]:
    """Win rates by judge, for the matrix: ``{judge: {policy: {versus: [win_rate, low, high, p_holm, ties]}}}``."""
    found: dict[str, Any] = {}
    for entry in report["win_rates"]:
        row = found.setdefault(entry["judge"], {}).setdefault(entry["policy"], {})
        row[entry["versus"]] = [entry["win_rate"], *entry["ci"], entry.get("p_holm"), entry["ties"]]
    return found


def sample_table(contenders: list[Contender], prompts: Prompts, judges: list[str]) -> dict[str, Any]:
    """One completion of every contender on every prompt, with its scores, for reading side by side.

    The first draw; for best-of-n the best of the first n of the pool.
    """
    policies = []
    rows = np.arange(len(prompts))
    for contender in contenders:
        draws = contender.draws
        per = draws.shape[1]
        columns = realised_best(draws, contender.n) if contender.n else np.zeros(len(prompts), dtype=int)
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
