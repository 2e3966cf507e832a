"""The campaign of faults, as a program: ``make faults``.

    python -m tests.faults [--kills 100] [--seed 1] [--ranks 1 2] [--only kills|spoilt|settings] [--folder DIR]

Kills at random moments, every file spoilt in four ways, some three hundred wrong settings; prints the table of
docs/faults.md. Exit code 1 where a bar is not met: a bit lost, an orphan, a leftover, a reply paid for twice, a
traceback, another result, a wrong setting taken.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import kills, spoilt, wrong_settings


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; 0 where every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared between the numbers of ranks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=("kills", "spoilt", "settings"))
    parser.add_argument(
        "--every", type=int, default=1, help="of the spoilt files and wrong settings, every so many-th"
    )
    parser.add_argument("--folder", help="keep the runs there")
    given = parser.parse_args(argv)
    lines, met, began = [], True, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        if given.only in (None, "settings"):
            found = wrong_settings.campaign(given.every)
            lines.append(f"| wrong settings | {sum(map(len, found.values()))} | {len(found['taken'])} taken |")
            met &= not found["taken"]
        if given.only in (None, "kills"):
            for ranks in given.ranks:
                tally = kills.campaign(folder / f"kills{ranks}", given.seed, given.kills // len(given.ranks), ranks)
                bars = ("lost", "orphans", "hangs", "leftovers", "paid_twice", "tracebacks")
                figures = kills.as_dict(tally)
                said = ", ".join(f"{figures[name]} {name.replace('_', ' ')}" for name in bars)
                lines.append(f"| kills, ranks: {ranks} | {tally.kills} | {said}; slowest end {tally.slowest:.0f} s |")
                lines += [f"  {name}: {item}" for name in bars if isinstance(getattr(tally, name), list)
                          for item in getattr(tally, name)]  # fmt: skip
                met &= not any(figures[name] for name in bars)
        if given.only in (None, "spoilt"):
            found = spoilt.campaign(folder / "spoilt", given.every)
            said = ", ".join(f"{len(cases)} {name}" for name, cases in found.items())
            lines.append(f"| spoilt files | {sum(map(len, found.values()))} | {said} |")
            lines += [f"  {name}: {case}" for name in ("refused", "other", "tracebacks") for case in found[name]]
            met &= not (found["tracebacks"] or found["other"])
    sys.stdout.write("\n".join(["| fault | tried | found |", "|---|---|---|", *lines]) + "\n")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s; {'every bar is met' if met else 'NOT every bar is met'}\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
