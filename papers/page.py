"""A paper's page (HTML and Markdown, the figure redrawn from our runs), and the table of all papers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_vs_dpo.artifacts.card import cell, table
from ppo_vs_dpo.artifacts.files import write_json, write_text
from ppo_vs_dpo.papers.claims import Claim, Report, summary
from ppo_vs_dpo.papers.miniature import Miniature
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.settings import file_of, full_settings, heading, settings_of, unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Checked:
    """A paper with what its miniature showed; no claims where it has not run."""

    paper: Paper
    miniature: Miniature | None
    reports: list[Report]

    @property
    def claims(self) -> list[Claim]:
        """Of the reports that are there; none unless every seed has run."""
        complete = self.miniature is not None and len(self.reports) == len(self.miniature.seeds)
        return self.paper.claims(self.reports) if complete else []

    @property
    def minutes(self) -> float:
        """What all seeds took together."""
        return sum(report.get("seconds") or 0.0 for report in self.reports) / 60


def number(value: float | None) -> str:
    """Three digits, a real minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.3g}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
    return text.replace("-", "−")


def interval(claim: Claim) -> str:
    """``[0.4, 0.6]``."""
    return f"[{number(claim.interval[0])}, {number(claim.interval[1])}]"


def state(checked: Checked) -> str:
    """Why there are no claims."""
    if checked.miniature is None:
        return "there is none."
    if not checked.reports:
        return "not run yet; nothing is claimed."
    return (
        f"{len(checked.reports)} of {len(checked.miniature.seeds)} seeds have run; nothing is claimed before all have."
    )


CLAIM_HEAD = ("claim", "the paper", "measured here", "95 % or range", "bar", "verdict")


def claim_rows(claims: Sequence[Claim]) -> list[list[str]]:
    """Cells of a table of claims."""
    return [
        [
            f"{cell(claim.statement.text)} ({cell(claim.statement.source)})",
            cell(claim.statement.expected),
            f"{number(claim.measured)}: {cell(claim.statement.quantity)}",
            interval(claim),
            claim.statement.bar,
            f"**{claim.held}**",
        ]
        for claim in claims
    ]


def picture(checked: Checked) -> "Figure | None":
    """The paper's figure from our reports."""
    if checked.paper.draw is None or not checked.reports:
        return None
    import matplotlib

    from ppo_vs_dpo.compare.report.plots import RC

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
        checked.paper.draw(axes, checked.reports)
        # What every seed draws is named once.
        handles = {name: h for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(handles.values(), handles, frameon=False, fontsize=8)
    return figure


def guesses(checked: Checked) -> list[tuple[str, str]]:
    """What did not hold, and our best guess why."""
    failed = [claim.statement.text for claim in checked.claims if claim.held != "held"]
    return [(text, checked.paper.explanations[text]) for text in failed if text in checked.paper.explanations]


def markdown(checked: Checked) -> str:
    """The page of one paper."""
    paper, claims = checked.paper, checked.claims
    parts = [f"# {paper.title}", paper.question]
    if claims:
        made = f"{len(checked.reports)} seeds, {checked.minutes:.1f} minutes in all"
        parts += [f"In miniature: {paper.world}; {made}. {summary(claims).capitalize()}."]
        parts += [table(CLAIM_HEAD, claim_rows(claims))]
    else:
        parts += [f"In miniature: {state(checked)}"]
    if checked.paper.draw is not None and checked.reports:
        parts += ["![The paper's figure, from our runs](figures/figure.svg)"]
    explained = [f"- *{cell(text)}* Our guess: {why}" for text, why in guesses(checked)]
    if explained:
        parts += ["What did not hold, and why (guesses, none of them tested):", "\n".join(explained)]
    if paper.published:
        rows = [[cell(text) for text in row] for row in paper.published]
        parts += ["The paper's own numbers:", table(("what", "number", "source"), rows)]
    if paper.unknown:
        parts += ["Not known: " + "; ".join(paper.unknown) + "."]
    return "\n\n".join(parts) + "\n"


def as_row(claim: Claim) -> dict[str, Any]:
    """A claim as ``claims.json`` has it."""
    said = ("text", "source", "expected", "quantity", "bar")
    found = {name: getattr(claim, name) for name in ("measured", "interval", "held", "seeds")}
    return {**{name: getattr(claim.statement, name) for name in said}, **found}


def write_pages(folder: Path, checked: Checked) -> None:
    """``claims.json``, ``report.md``, ``report.html`` and ``figures/`` of one paper."""
    import jinja2
    from markupsafe import Markup

    from ppo_vs_dpo.compare.report.pages import TEMPLATES
    from ppo_vs_dpo.compare.report.plots import element_of, write_figure

    write_json(folder / "claims.json", [as_row(claim) for claim in checked.claims])
    drawn = picture(checked)
    chart = Markup("")
    if drawn is not None:
        text = write_figure(drawn, folder / "figures", "figure")
        chart = Markup(element_of(text, "The paper's figure, from our runs", "figure"))
    write_text(folder / "report.md", markdown(checked))
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = made.from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")).render(
        paper=checked.paper,
        claims=checked.claims,
        seeds=len(checked.reports),
        minutes=f"{checked.minutes:.1f}",
        summary=summary(checked.claims),
        state=state(checked),
        number=number,
        interval=interval,
        chart=chart,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )
    write_text(folder / "report.html", page)


def description(paper: Paper) -> str:
    """What ``paper show`` prints: the claims, the sources, what is unknown, the configurations."""
    lines = [paper.title, "", paper.question, "", f"In full: {paper.takes}"]
    if paper.world:
        lines.append(f"In miniature: {paper.world}")
    lines += ["", "Claims that the miniature looks at"]
    for one in paper.statements:
        lines += [
            f"  - {one.text} [{one.source}]",
            f"      the paper: {one.expected}; held where {one.quantity}: {one.bar}",
        ]
    if paper.published:
        lines += ["", "The paper's own numbers"]
        lines += [f"  - {what}: {value} [{source}]" for what, value, source in paper.published]
    lines += ["", "Not known"] if paper.unknown else []
    lines += [f"  - {text}" for text in paper.unknown]
    for setting in full_settings(paper.name):
        path = file_of(paper.name, setting)
        lines += ["", f"paper={paper.name}/{setting}: {' '.join(heading(path))}"]
        lines += [
            f"  {one.key}: {one.value}  # {one.comment} [{one.kind}{': ' + one.place if one.place else ''}]"
            for one in settings_of(path)
        ]
        lines += [f"  to set yourself: {key}" for key in unknown(path)]
    return "\n".join(lines) + "\n"


def overview(checked: Sequence[Checked]) -> str:
    """What ``paper list`` prints."""
    width = max(len(one.paper.name) for one in checked)
    lines = []
    for one in checked:
        shown = summary(one.claims) if one.claims else state(one)
        lines.append(f"{one.paper.name:<{width}}  {one.paper.question}")
        lines.append(
            f"{'':<{width}}  in full ({', '.join(full_settings(one.paper.name)) or 'none'}): {one.paper.takes}"
        )
        lines.append(f"{'':<{width}}  in miniature: {shown}")
    return "\n".join(lines) + "\n"


def minutes(checked: Sequence[Checked]) -> float:
    """What all miniatures took; runs of the pipeline that several papers look at count once."""
    spent: dict[str, float] = {}
    for one in checked:
        if one.miniature is not None:
            # A world belongs to one paper.
            spent["".join(one.miniature.run) or one.paper.name] = one.minutes
    return sum(spent.values())


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def document(checked: Sequence[Checked]) -> str:
    """docs/papers.md."""
    every = [claim for one in checked for claim in one.claims]
    lines = [
        "# Papers: what they claim, and what our own runs show",
        "",
        "Written by `make papers` (`ppo-vs-dpo paper run --all --table docs/papers.md`). `ppo-vs-dpo paper show NAME`",
        "has each paper's configurations with the source of every number.",
        "",
        "A miniature shows whether a claim's *signature* appears where everything can be known. It says nothing about",
        "the size of an effect in full. A claim is *held* where the 95 % interval over seeds (Student's t; for",
        "claims about every run: all of them) lies inside the bar, *not held* where it lies outside, and else *not",
        "decided by so little*. Settings were fixed on the first seed; the others were run once. What did not hold",
        "stays here.",
        "",
        "Sources: [P] read in the paper, [C] in released code or its documentation, [S] in somebody else's note",
        "about the paper, [F] read off a figure by eye, [R] in a repository's README or threads. Re-check [S] and",
        "[F] before you quote them. `ppo-vs-dpo paper run NAME --full SETTING` says what a full configuration takes",
        "and asks for what nobody published before it runs. A report is made again when its world's code changes.",
        "",
        f"{len(checked)} papers, {len(every)} claims: {summary(every) if every else 'none checked yet'}; "
        f"{minutes(checked):.1f} minutes in all.",
    ]
    rows = [
        [
            f"[{one.paper.name}](#{anchor(one.paper.title)})",
            str(len(one.reports)),
            f"{one.minutes:.1f}",
            summary(one.claims) if one.claims else state(one),
        ]
        for one in checked
    ]
    lines += ["", table(("paper", "seeds", "minutes", "claims in miniature"), rows)]
    for one in checked:
        lines += ["", f"## {one.paper.title}", "", one.paper.question]
        full = ", ".join(f"`paper={one.paper.name}/{setting}`" for setting in full_settings(one.paper.name))
        lines += ["", f"In full: {full or 'no configuration'}; {one.paper.takes}."]
        if one.claims:
            seeds = ", ".join(str(report["seed"]) for report in one.reports)
            lines += ["", f"In miniature: {one.paper.world}. Seeds {seeds}; {one.minutes:.1f} minutes."]
            lines += ["", table(CLAIM_HEAD, claim_rows(one.claims))]
            for text, why in guesses(one):
                lines += ["", f"*{cell(text)}*: our guess, not tested: {why}"]
        else:
            lines += ["", f"In miniature: {state(one)}"]
        if one.paper.published:
            rows = [[cell(text) for text in row] for row in one.paper.published]
            lines += ["", "<details><summary>The paper's own numbers</summary>", ""]
            lines += [table(("what", "number", "source"), rows), "", "</details>"]
    return "\n".join(lines) + "\n"
