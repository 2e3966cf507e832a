"""``ppo-vs-dpo data inspect SOURCE``: what is in a preference data set, what is wrong with it, what a model reads."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say, terminal
from ppo_vs_dpo.preferences.reading.as_read import AsRead
from ppo_vs_dpo.preferences.reading.importing import RENAMED, TokenLimits, mapped, within_limits
from ppo_vs_dpo.preferences.reading.inspect.following import following
from ppo_vs_dpo.preferences.reading.inspect.sequence import sequence_of, show_sequence
from ppo_vs_dpo.preferences.reading.mappings import MAPPINGS, MappingOptions
from ppo_vs_dpo.preferences.reading.mappings.columns import not_read
from ppo_vs_dpo.preferences.reading.mappings.rendered import Renderer
from ppo_vs_dpo.preferences.reading.near import LeakCount
from ppo_vs_dpo.preferences.reading.readers import Placed, read_any, read_hub
from ppo_vs_dpo.preferences.reading.validation import PROBLEMS, Checker, Report, policies
from ppo_vs_dpo.preferences.schema import Text


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo data inspect", description=in_help(__doc__))
    parser.add_argument(
        "source", help="a Hub name, a .jsonl, .json, .parquet or .csv file (.gz too), or a folder of them"
    )
    parser.add_argument(
        "--model",
        "--tokenizer",
        help="a model folder or Hub name: shows the tokens it reads and where the loss is",
    )
    parser.add_argument("--format", default="auto", choices=["auto", *MAPPINGS], help="the source's format")
    parser.add_argument(
        "--columns",
        default="",
        help="the columns' names, e.g. prompt=question,chosen=better,rejected=worse",
    )
    parser.add_argument("--split", default="train", help="the Hub's split")
    parser.add_argument("--subset", help="the Hub's configuration")
    parser.add_argument("--test", help="a file with test pairs, or test:SPLIT of the Hub: looks for shared prompts")
    parser.add_argument(
        "--conversational", choices=["true", "false"], help="make messages of texts, or texts of messages"
    )
    parser.add_argument(
        "--rendered", action="store_true", help="with --model: conversations as its chat template writes them"
    )
    parser.add_argument("--tokens", action="store_true", help="with --model: a line for each token")
    parser.add_argument("--max-prompt-tokens", type=int, help="longer prompts are counted as truncated")
    parser.add_argument("--max-response-tokens", type=int, help="longer responses are counted as truncated")
    parser.add_argument("--max-rows", type=int, help="look at the first rows only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the report.

    Returns:
        0, or 2 where the data would be refused as it is.

    Raises:
        UserError: the source cannot be read at all.
    """
    options = arguments(argv)
    console = terminal(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("reading")
        report, first = inspect(
            options, lambda rows: progress.update(task, description=f"{rows} rows read") if rows % 500 == 0 else None
        )
    if options.json:
        say(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    else:
        show(report, first, options=options)
    stops = report.refused or any(found.policy == "error" for found in report.problems.values())
    return 2 if stops or not report.pairs else 0


def inspect(options: argparse.Namespace, progress) -> tuple[Report, dict | None]:
    """Read everything; the report, and the first good pair."""
    conversational = {"true": True, "false": False, None: None}[options.conversational]
    report = Report(options.source)
    checker = Checker(report, policies())
    limits = TokenLimits(_tokenizer(options), options.max_prompt_tokens, options.max_response_tokens)
    render = Renderer(limits.tokenizer) if options.rendered else None
    mapping = MappingOptions(columns=columns_of(options), conversational=conversational, render=render)
    as_read = AsRead(limits.tokenizer, checker, conversational)
    test_prompts: set[int] = set()
    leaks = LeakCount([])
    if options.test:
        rows = mapped(_rows(options, options.test), Report(options.test), checker, mapping, options.format)
        leaks = LeakCount(list({row["prompt_id"]: row["prompt"] for _, row in rows}.values()))
        test_prompts, checker.prompts, checker.seen = checker.prompts, set(), set()
    first = None
    for place, row in within_limits(
        mapped(_counted(_rows(options), options, progress), report, checker, mapping, options.format), limits, checker
    ):
        if not as_read.keeps(place, row):
            continue
        if int(row["prompt_id"], 16) in test_prompts and checker.drops("leakage", place, f"prompt {row['prompt_id']}"):
            continue
        leaks.passes(str(place), row["prompt"])
        first = first or row
        report.pairs += 1
        checker.statistics.add(row)
    report.prompts = len(checker.prompts)
    report.statistics = checker.statistics.summary()
    report.said += [*without_numbers(report), *as_read.said, *([said] if (said := leaks.sentence()) else [])]
    if first is not None and limits.tokenizer is not None:
        report.sequence = sequence_of(limits.tokenizer, first)
    return report, first


# What a pair is without a number that others have.
WITHOUT = {
    "margin": "with reward_model.use_margin their loss is the plain one",
    "soft_label": "they are taken for certain",
    "chosen_score": "figures on scores leave them out",
    "rejected_score": "figures on scores leave them out",
}


def without_numbers(report: Report) -> list[str]:
    """A sentence for each column of numbers that some pairs have and others do not."""
    known = {name: report.statistics[name]["known"] for name in WITHOUT if name in report.statistics}
    return [
        f"{report.pairs - n} of {report.pairs} pairs have no {name} (empty, null or NaN): {WITHOUT[name]}."
        for name, n in known.items()
        if n < report.pairs
    ]


def columns_of(options: argparse.Namespace) -> dict[str, str]:
    """``--columns`` as a mapping.

    Raises:
        UserError: it is not written as one.
    """
    columns = dict(item.split("=", 1) for item in options.columns.split(",") if "=" in item)
    if options.columns and len(columns) != len(options.columns.split(",")):
        raise UserError(f"--columns {options.columns}: give it as prompt=question,chosen=better,rejected=worse.")
    return columns


def _tokenizer(options: argparse.Namespace):
    limited = options.max_prompt_tokens is not None or options.max_response_tokens is not None
    if limited and options.model is None:
        raise UserError("--max-prompt-tokens and --max-response-tokens need --model MODEL.")
    if (options.tokens or options.rendered) and options.model is None:
        raise UserError("--tokens and --rendered need --model MODEL.")
    if options.model is None:
        return None
    from ppo_vs_dpo.models.loading.pretrained import load_tokenizer

    return load_tokenizer(options.model)


def _rows(options: argparse.Namespace, test: str | None = None) -> Iterator[Placed]:
    if test is not None and test.startswith("test:"):
        return read_hub(options.source, test.removeprefix("test:"), options.subset)
    return read_any(test or options.source, options.split, subset=options.subset, streaming=True)


def _counted(rows: Iterator[Placed], options: argparse.Namespace, progress) -> Iterator[Placed]:
    for number, row in enumerate(rows, start=1):
        if options.max_rows is not None and number > options.max_rows:
            return
        progress(number)
        yield row


def show(
    report: Report, first: dict | None, console: Console | None = None, options: argparse.Namespace | None = None
) -> None:
    """Print a report for people."""
    console = console or terminal(soft_wrap=True, highlight=False)
    form = "none" if first is None else "conversation" if isinstance(first["prompt"], list) else "plain text"
    console.print(f"[bold]{escape(report.source)}[/]  format {report.format or 'unknown'}, {form}")
    console.print(f"{report.rows} rows, {report.pairs} usable pairs, {report.prompts} different prompts\n")
    for reason, count in report.filtered.items():
        console.print(f"left out by a filter: {count} ({escape(reason)})")
    if report.problems:
        table = Table("problem", "rows", "what is done", "where first seen", title="Problems", title_justify="left")
        for kind, found in sorted(report.problems.items(), key=lambda item: (item[1].policy != "error", item[0])):
            seen = "\n".join(f"{Path(e['place']).name}: {e['detail']}" for e in found.examples[:3])
            does = {"error": "[red]stops[/]", "drop": "dropped", "keep": "kept"}[found.policy]
            table.add_row(f"{kind}\n[dim]{PROBLEMS[kind].words}[/]", str(found.count), does, escape(seen))
        console.print(table)
    elif not (report.refused or without_numbers(report)):
        console.print("No problems found.")
    if report.statistics:
        _show_statistics(report, console)
    if first is not None:
        console.print("\n[bold]The first pair[/]")
        for side in ("prompt", "chosen", "rejected"):
            text = " ".join(_with_roles(first[side]).split())
            console.print(f"  {side}: {escape(text[:150])}{'…' if len(text) > 150 else ''}")
    if report.format in RENAMED and (others := not_read(report.columns, columns_of(options) if options else {})):
        console.print(f"\n[dim]Columns that are not read: {escape(', '.join(others))}[/]")
    if options is None:
        return
    if report.sequence:
        show_sequence(report.sequence, options.model, console, options.tokens)
    for sentence in report.said:
        console.print(f"[yellow]{escape(sentence)}[/]")
    conversation = first is not None and isinstance(first["prompt"], list)
    lines = following(report, options, columns_of(options), conversation)
    console.print(f"\n[bold]{escape(lines[0])}[/]")
    for line in lines[1:]:
        console.print(escape(line))


def _with_roles(value: Text) -> str:
    return value if isinstance(value, str) else " ".join(f"[{turn['role']}] {turn['content']}" for turn in value)


def _show_statistics(report: Report, console: Console) -> None:
    statistics = dict(report.statistics)
    rule = statistics.pop("length_rule")
    words = statistics.pop("words")
    table = Table("", "mean", "min", "5 %", "median", "95 %", "max", title="Statistics", title_justify="left")
    named = [(f"{side} (words)", values) for side, values in words.items()]
    for name, values in [*named, *statistics.items()]:
        table.add_row(name, *(f"{values[key]:.4g}" for key in ("mean", "min", "p5", "median", "p95", "max")))
    console.print(table)
    low, high = rule["interval"]
    if rule["longer_is_chosen"] < 0.5:
        low, high = 1 - high, 1 - low
    console.print(
        f"The longer response is the chosen one in {rule['chosen_longer']:.1%} of the pairs, the shorter in "
        f"{rule['chosen_shorter']:.1%}.\nA rule that looks at length alone is right in "
        f"{max(rule['longer_is_chosen'], 1 - rule['longer_is_chosen']):.1%} (95 % interval: {low:.1%} to {high:.1%}); "
        f"a coin in 50 %."
    )
    if "score_difference" in statistics:
        share = statistics["score_difference"]["chosen_not_higher"]
        console.print(f"The chosen response does not score higher in {share:.1%} of the scored pairs.")
