"""The table of docs/models.md: ``python -m tests.matrix.table --write docs/models.md`` (some minutes on one core).

For each architecture and measure the largest difference to plain transformers or TRL in fp32; where that is above
1e-5, the same in fp64.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path

import datasets
import torch
from transformers.utils import logging as transformers_logging

from tests.matrix.measures import IN_DOUBLE, MEASURES, in_double
from tests.matrix.test_matrix import CLOSE
from tests.matrix.tiny import ARCHITECTURES, REFUSED

MARKS = ("<!-- the matrix: begin -->", "<!-- the matrix: end -->")


def row(name: str) -> list[str]:
    """The cells of one architecture."""
    cells = [f"`{name}`"]
    for measure, of in MEASURES.items():
        with contextlib.redirect_stdout(io.StringIO()):
            apart = of(name)
            text = "no such model" if apart is None else f"{apart:.0e}" if apart else "0"
            if apart is not None and apart > CLOSE and measure in IN_DOUBLE:
                with in_double():
                    text += f" (fp64 {of(name):.0e})"
        cells.append(text)
    return cells


def table(names: list[str], page: str = "") -> str:
    """Markdown; rows of other architectures than ``names`` are those of the ``page``."""
    head = ["architecture", *MEASURES]
    lines = [head, ["---"] * len(head)]
    there = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines()]
    known = {cells[0].strip("`"): cells for cells in there if len(cells) == len(head)}
    for name in ARCHITECTURES if page else names:
        lines.append(row(name) if name in names or name not in known else known[name])
        sys.stderr.write(" | ".join(lines[-1]) + "\n")
    refused = f"Refused, since padding reaches their state: {', '.join(f'`{name}`' for name in REFUSED)}."
    return "\n".join([f"| {' | '.join(cells)} |" for cells in lines]) + f"\n\n{refused}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a page with the two marks between which the table stands")
    parser.add_argument("names", nargs="*", help="architectures; all by default, and the rows of others stay")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = asked.names or list(ARCHITECTURES)
    if asked.write is None:
        print(table(names))
        return
    text = asked.write.read_text(encoding="utf-8")
    found = table(names, text)
    begin, end = map(re.escape, MARKS)
    text = re.sub(f"{begin}.*{end}", f"{MARKS[0]}\n{found}{MARKS[1]}", text, flags=re.DOTALL)
    asked.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
