"""Where the time of a run's stages went: one table, from what each of them wrote when it ended (``--profile``)."""

from collections.abc import Mapping, Sequence

from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.artifacts.resources import PARTS
from ppo_vs_dpo.artifacts.run import RunFolder

ABOUT = (
    "Wall-clock seconds of each finished stage's process from its start on, by part, those of interrupted attempts in "
    "one; CPU seconds with those of the processes that it started."
)
FORKED = "libraries, once"
ABOUT_FORKED = f"'{FORKED}' is the process of this command that stages are forks of; it imports beside other work."
INTERRUPTED = "interrupted"


def profile(run: RunFolder, names: Sequence[str], once: Mapping[str, float] | None = None) -> str:
    """The table in Markdown, a row for each job that has finished and one for all of them.

    Args:
        once: what the process took that stages were forks of (`launch.ForkServer.spent`), where there was one.
    """
    rows: list[tuple[str, dict[str, float], float]] = []
    without = []
    if once:
        rows.append((FORKED, {part: once.get(part, 0.0) for part in PARTS}, once.get("CPU", 0.0)))
    for name in names:
        done = run.done(name) or {}
        cost = done.get("cost") or {}
        if cost.get("times"):
            # Its last word was written a moment after its account was closed.
            before = done["seconds"] - sum(cost["times"].values())
            times = {**cost["times"], INTERRUPTED: before if before > 0.5 else 0.0}
            rows.append((name, times, cost.get("cpu_seconds", 0.0)))
        else:
            without.append(name)
    total = {part: sum(times.get(part, 0.0) for _, times, _ in rows) for part in (*PARTS, INTERRUPTED)}
    rows.append(("together", total, sum(cpu for *_, cpu in rows)))
    shown = [part for part in total if total[part] >= 0.05]
    table = [["stage", "seconds", *shown, "CPU"], ["---"] * (len(shown) + 3)]
    for name, times, cpu in rows:
        numbers = [sum(times.values()), *(times.get(part, 0.0) for part in shown), cpu]
        table.append([name, *(f"{number:.1f}" for number in numbers)])
    lines = [f"{ABOUT} {ABOUT_FORKED}" if once else ABOUT, "", *(f"| {' | '.join(cells)} |" for cells in table)]
    if without:
        lines += ["", f"Not known: {', '.join(without)}."]
    return "\n".join(lines) + "\n"


def write_profile(run: RunFolder, names: Sequence[str], once: Mapping[str, float] | None = None) -> None:
    """Write ``profile.md`` into the run folder, and print it."""
    text = profile(run, names, once)
    write_text(run.path("profile.md"), text)
    say(f"\n{text}")
