"""What to type after an inspection: the command that starts a run with these pairs, or the one that mends them."""

import argparse
import re
import shlex
from pathlib import Path

from ppo_vs_dpo.preferences.reading.mappings.columns import as_option, as_setting
from ppo_vs_dpo.preferences.reading.readers import is_local
from ppo_vs_dpo.preferences.reading.validation import Report

# Options that say nothing.
USUAL = (("format", "auto"), ("split", "train"))


def following(report: Report, options: argparse.Namespace, columns: dict[str, str], conversation: bool) -> list[str]:
    """Lines that end the report: why a run would stop and the way out, or the command that starts one."""
    source = shlex.quote(options.source)
    fatal = {kind: found for kind, found in report.problems.items() if found.policy == "error" and found.count}
    if report.proposal:
        return [
            f"A run would stop here. The columns are {', '.join(report.columns)}; these names make pairs of them:",
            f"  {again(options, columns=as_option(report.proposal))}",
        ]
    if fatal:
        return [f"A run would stop here. {report.remedy(fatal)}"]
    if not report.pairs:
        return ["There is no usable pair."]
    if report.refused:
        return [
            "A run would stop here:",
            *(f"  {sentence}" for sentence in report.refused),
            "See what either makes of them:",
            *(f"  {again(options, conversational=choice)}" for choice in ("true", "false")),
        ]
    lines = []
    if options.model is None:
        lines += [
            "See what a model would read (every token, and where the loss is):",
            f"  {again(options, model='MODEL')}",
        ]
    words = ["ppo-vs-dpo try", f"name={_name(options.source)}"]
    words.append(f"model.path={shlex.quote(options.model) if options.model else 'MODEL'}")
    words += [f"data.path={source}"]
    words += [f"data.format={options.format}"] if options.format not in ("auto", "pairs") else []
    words += [as_setting(columns)] if columns else []
    if not is_local(options.source):
        words += [f"data.split={options.split}"] if options.split != "train" else []
        words += [f"data.subset={options.subset}"] if options.subset else []
    words += ["data.rendered=true"] if options.rendered else []
    if not options.rendered and (not conversation or options.conversational is not None):
        words.append(f"data.conversational={'true' if conversation or options.model is None else 'false'}")
    return [
        *lines,
        "Start a small run with these pairs (`hh data=files` in place of `try`: the full size):",
        f"  {' '.join(words)}",
    ]


def again(options: argparse.Namespace, **other: str) -> str:
    """The command that was typed with ``other`` options beside those it had: what was said of a file stays said."""
    words = ["ppo-vs-dpo data inspect", shlex.quote(options.source)]
    for name, value in {**vars(options), **other}.items():
        if name in ("source", "json") or value in (None, "", False) or (name, value) in USUAL:
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += [] if value is True else [shlex.quote(str(value))]
    return " ".join(words)


def _name(source: str) -> str:
    """A run's name from a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.rstrip("/")).name.split(".")[0]).strip("_") or "mine"
