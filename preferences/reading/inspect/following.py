"""What to type after an inspection: the command that starts a run with these pairs, or the one that mends them."""

import argparse
import re
import shlex
from pathlib import Path

from ppo_vs_dpo.preferences.reading.mappings.columns import as_option, as_setting
from ppo_vs_dpo.preferences.reading.readers import is_local
from ppo_vs_dpo.preferences.reading.validation import Report


def following(report: Report, options: argparse.Namespace, columns: dict[str, str], conversation: bool) -> list[str]:
    """Lines that end the report: why a run would stop and the way out, or the command that starts one."""
    source = shlex.quote(options.source)
    model = f" --model {shlex.quote(options.model)}" if options.model else ""
    fatal = {kind: found for kind, found in report.problems.items() if found.policy == "error" and found.count}
    if report.proposal:
        return [
            f"A run would stop here. The columns are {', '.join(report.columns)}; these names make pairs of them:",
            f"  ppo-vs-dpo data inspect {source}{model} --columns {as_option(report.proposal)}",
        ]
    if fatal:
        return [f"A run would stop here. {report.remedy(fatal)}"]
    if not report.pairs:
        return ["There is no usable pair."]
    if report.refused:
        named = f" --columns {as_option(columns)}" if columns else ""
        asked = f"  ppo-vs-dpo data inspect {source}{model}{named}"
        return [
            "A run would stop here:",
            *(f"  {sentence}" for sentence in report.refused),
            "See what either makes of them:",
            *(f"{asked} --conversational {choice}" for choice in ("true", "false")),
        ]
    lines = []
    if options.model is None:
        lines += [
            "See what a model would read (every token, and where the loss is):",
            f"  ppo-vs-dpo data inspect {source} --model MODEL",
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


def _name(source: str) -> str:
    """A run's name from a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.rstrip("/")).name.split(".")[0]).strip("_") or "mine"
