"""The comparison's statistics under simulation: coverage and error rates of every kind of figure, each with its
Monte-Carlo error.

    python -m benchmarks.statistics_audit --write docs/statistics.md     (`make audit`)

Data are drawn here with numpy, from laws whose true figures are known; the project's functions see the data only.
Prints a table for each kind of figure and, with ``--write``, puts them between the page's markers. Ends with exit code
1 where a cell lies outside of its bar by more than three Monte-Carlo errors and is not marked as a bound. One thread;
about ten minutes.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.statistics_audit.cells import Cell
from benchmarks.statistics_audit.fitted import kl_allows, length_control, matched, optimum, rankings, rings
from benchmarks.statistics_audit.rates import clusters, controls, equality, means, over_seeds, win_rates_of_one_run
from benchmarks.statistics_audit.second import MORE
from ppo_vs_dpo.artifacts.files import write_text

START, END = "<!-- audit: begin -->", "<!-- audit: end -->"


TABLES = {
    "Win rates of one run": win_rates_of_one_run,
    "Equality": equality,
    "Means over prompts": means,
    "Over seeds and prompts": over_seeds,
    "Clusters of prompts": clusters,
    "Controls": controls,
    "One KL": matched,
    "What KL allows": kl_allows,
    "Over-optimisation": rings,
    "The optimum": optimum,
    "Ranking": rankings,
    "Length control": length_control,
    **MORE,
}


def run(scale: float, only: str = "") -> list[tuple[str, list[Cell]]]:
    """All tables."""
    found = []
    for number, (name, cells) in enumerate(TABLES.items()):
        if only.lower() in name.lower():
            found.append((name, list(cells(np.random.default_rng([2026, number]), scale))))
    return found


def markdown(tables: list[tuple[str, list[Cell]]]) -> str:
    """The tables as the page shows them."""
    lines = []
    for name, cells in tables:
        lines += [f"### {name}", "", "| simulated | % | ± | bar | |", "|---|---|---|---|---|"]
        for cell in cells:
            bar = f"{cell.bar[0]:g} to {cell.bar[1]:g}"
            lines.append(f"| {cell.what} | {cell.found:.1f} | {cell.error:.1f} | {bar} | {cell.verdict} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", metavar="PAGE", help="put the tables between the page's markers")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--only", default="", help="tables whose name holds this")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    tables = run(arguments.scale, arguments.only)
    text = markdown(tables)
    sys.stdout.write(text)
    missed = [cell for _, cells in tables for cell in cells if cell.verdict.startswith("**")]
    sys.stdout.write(f"\n{len(missed)} of {sum(len(c) for _, c in tables)} cells outside of their bars\n")
    sys.stderr.write(f"{time.monotonic() - started:.0f} s\n")
    if arguments.write:
        page = Path(arguments.write).read_text(encoding="utf-8")
        head, tail = page[: page.index(START) + len(START)], page[page.index(END) :]
        write_text(Path(arguments.write), f"{head}\n\n{text}\n{tail}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
