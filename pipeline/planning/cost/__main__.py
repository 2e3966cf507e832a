"""What a finished run was estimated to cost, beside what it took.

    python -m ppo_vs_dpo.pipeline.planning.cost RUN

The estimate is the one that a run makes before its first stage, with a machine that is measured now and examples that
are counted; ``launch.expected_seconds`` is not looked at. What it took is from the stages' ``done.json``.
"""

import argparse
import os
import sys

from ppo_vs_dpo.artifacts.errors import UserError, printable, say, warn
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder
from ppo_vs_dpo.pipeline.planning.cost.beforehand import speed_of, spell
from ppo_vs_dpo.pipeline.planning.cost.work import work_of

READ = """\
measured on {device}; stages that ran at once are added up. Both are of a stage's process from its start on; overview
and report have the same seconds. The {start} in which it loads its libraries are in the estimates, and in what stages
took that are no forks (docs/pipeline.md). Other work on the machine is in what they took, and neither in the estimates
nor in the seconds of CPUs: those are of all processes of a stage together. Answers that ended early were estimated at
their full length.
"""


def main(argv: list[str] | None = None) -> int:
    """Print a line for each stage that has finished.

    Raises:
        UserError: no run there, none of its stages finished, or the model cannot be measured.
    """
    parser = argparse.ArgumentParser(prog="python -m ppo_vs_dpo.pipeline.planning.cost", description=__doc__)
    parser.add_argument("run", help="a run folder")
    given = parser.parse_args(argv)
    run = RunFolder(given.run)
    names = [*STAGES[:-1], *run.points("dpo"), *run.points("ppo"), STAGES[-1]]
    finished = {name: done for name in names if (done := run.done(name)) is not None}
    took = {name: float(done["seconds"]) for name, done in finished.items()}
    if not took:
        raise UserError(f"{run.root}: no stage has finished, so there is nothing to compare an estimate with.")
    threads = str(run.config.launch.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    speed = speed_of(run, environment)
    if speed is None:
        raise UserError(f"{run.root}: its model could not be measured (ppo-vs-dpo check says why).")
    lines, total = [f"{'stage':<22}{'estimated':>12}{'took':>12}{'of CPUs':>12}"], 0.0
    for name, seconds in took.items():
        guess = work_of(run, name, speed["characters"]).seconds(speed)
        total += guess or 0.0
        own = (finished[name].get("cost") or {}).get("cpu_seconds")
        cells = ("?" if guess is None else f"{guess:,.0f} s", f"{seconds:,.0f} s", f"{own:,.0f} s" if own else "")
        lines.append(f"{name[:21]:<22}" + "".join(f"{cell:>12}" for cell in cells).rstrip())
    lines.append(f"{'all':<22}{f'{total:,.0f} s':>12}{f'{sum(took.values()):,.0f} s':>12}")
    lines.append(READ.format(device=speed["device"], start=spell(speed["start"])))
    say("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        warn(f"\nerror: {printable(str(error))}\n")
        sys.exit(2)
