"""The campaign of faults, as a program: ``make faults``.

    python -m tests.faults [--only kills|spoilt|disks|settings] [--kills 100] [--disks 20] [--seed 1] [--ranks 1 2]
                           [--folder DIR] [--minutes M] [--write docs/faults.md] [--table-only]

What was seen is kept in a folder (`--folder`), a line each: the same command goes on from there, so that a campaign
can be made in pieces. It prints the table of docs/faults.md, and writes it there with `--write`. Exit code 1 where a
bar is not met: a bit lost, an orphan, a leftover, a reply paid for twice, a traceback, a spoilt file that is neither
named nor mended, a wrong setting that is taken.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl, write_text
from ppo_vs_dpo.artifacts.guards.versions import source_hash
from tests.faults import disks, kills, spoilt, wrong_settings

PARTS = ("settings", "kills", "spoilt", "disks")
BEGIN, END = "<!-- make faults: begin -->", "<!-- make faults: end -->"


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; 0 where every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=100, help="in all; of two numbers of ranks the second has a fifth"
    )
    parser.add_argument("--disks", type=int, default=20, help="full disks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--folder", help="keep there what was seen, and go on from it")
    parser.add_argument("--write", type=Path, help="a page that has a place for the table")
    parser.add_argument("--table-only", action="store_true", help="run nothing: the table of what the folder holds")
    given = parser.parse_args(argv)
    if given.table_only:
        if not given.folder:
            parser.error("--table-only needs --folder")
        given.only = []
    if "disks" in given.only and not disks.possible():
        words = disks.in_a_namespace(list(sys.argv[1:] if argv is None else argv))
        if words is not None:
            return subprocess.run(words, check=False).returncode
        sys.stderr.write("full disks are left out: this machine lets nobody mount one.\n")
        given.only = [part for part in given.only if part != "disks"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        left = lambda: given.minutes - (time.monotonic() - began) / 60  # noqa: E731
        if "settings" in given.only:
            found = wrong_settings.campaign()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.jsonl").unlink(missing_ok=True)
            for end, items in found.items():
                for item in items:
                    append_jsonl(folder / "settings.jsonl", {"case": item, "end": end, "source": source_hash()})
        if "kills" in given.only:
            fifth = given.kills // 5 if len(given.ranks) > 1 else 0
            for number, ranks in enumerate(given.ranks):
                share = fifth if number else given.kills - fifth
                kills.campaign(folder, given.seed, share, ranks, left())
        if "spoilt" in given.only:
            spoilt.campaign(folder, left())
        if "disks" in given.only:
            disks.campaign(folder, given.seed, given.disks, left())
        text, met = table(folder)
    sys.stdout.write(text)
    if given.write is not None:
        write(given.write, text)
    return 0 if met else 1


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What was seen of one kind."""
    path = folder / f"{name}.jsonl"
    return read_jsonl(path) if path.is_file() else []


def table(folder: Path) -> tuple[str, bool]:
    """The table of what was seen, and whether every bar is met."""
    lines, details, met = [], [], True
    episodes = rows_of(folder, "kills")
    for ranks in sorted({row["ranks"] for row in episodes}):
        seen = kills.tally([row for row in episodes if row["ranks"] == ranks])
        counts = {name: seen[name] if isinstance(seen[name], int) else len(seen[name]) for name in kills.BARS}
        words = {"lost": "bits lost", "paid_twice": "replies paid twice", "unsaid": "ends without their cause"}
        said = ", ".join(f"{count} {words.get(name, name)}" for name, count in counts.items())
        lines.append(
            f"| {seen['kills']} kills in {seen['episodes']} runs, ranks: {ranks} | {said}; the slowest end took "
            f"{seen['slowest']:.0f} s; {seen['on_the_way']} replies were on their way when the kill came, and were "
            f"asked for again |"
        )
        for name in ("stages", "modes", "moments"):
            details.append(f"- {name}, ranks {ranks}: {counted(seen[name])}")
        details += [f"- {name}: {item}" for name in kills.BARS if isinstance(seen[name], list) for item in seen[name]]
        met &= not any(counts.values())
    files = rows_of(folder, "spoilt")
    if files:
        ends = Counter(row["end"] for row in files)
        names = {"mended": "ended with the same bits", "named": "named", "other": "other results", "unseen": "unseen",
                 "traceback": "tracebacks"}  # fmt: skip
        lines.append(
            f"| {len(files)} spoilt files | {', '.join(f'{ends[key]} {name}' for key, name in names.items())} |"
        )
        details += [f"- {row['case']}: {row['end']}" for row in files if row["end"] not in ("mended", "named")]
        met &= not (ends["other"] or ends["unseen"] or ends["traceback"])
    full = rows_of(folder, "disks")
    if full:
        wrong = [row for row in full if disks.bad(row)]
        ended = sum(row["code"] == 0 for row in full)
        lines.append(
            f"| {len(full)} full disks | {sum(row['said'] for row in full)} said so in a sentence, {ended} had room "
            f"enough, {sum(row['code'] != 0 and not row['said'] for row in full)} ended in other words; "
            f"{sum(bool(row['lost']) for row in full)} bits lost, {sum(row['traceback'] for row in full)} tracebacks, "
            f"{sum(bool(row['leftovers']) for row in full)} leftovers |"
        )
        details += [f"- {row['stage']} with {row['room']:,} bytes: {row['words']}" for row in wrong]
        met &= not wrong
    values = rows_of(folder, "settings")
    if values:
        taken = [row["case"] for row in values if row["end"] == "taken"]
        lines.append(
            f"| {len(values)} wrong settings | {len(taken)} taken; all others refused before a stage starts |"
        )
        details += [f"- taken: {case}" for case in taken]
        met &= not taken
    sources = Counter(row["source"] for row in [*episodes, *files, *full, *values])
    details.append(f"- of the source {counted(sources)}; {platform.system()}, Python {platform.python_version()}")
    verdict = "Nothing that was tried missed its bar." if met else "NOT every bar is met."
    return "\n".join(["| tried | found |", "|---|---|", *lines, "", verdict, "", *details, ""]), met


def counted(numbers: dict[str, int]) -> str:
    """``{"sft": 3, "dpo": 1}`` -> ``"3 sft, 1 dpo"``."""
    return ", ".join(f"{count} {name}" for name, count in sorted(numbers.items(), key=lambda item: -item[1]))


def write(page: Path, text: str) -> None:
    """Put the table into its place on a page."""
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(before), f"{page} has no place for the table"
    write_text(page, pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n{END}", before))


if __name__ == "__main__":
    sys.exit(main())
