"""``ppo-vs-dpo verify RUN``: is every finished result what was written, byte for byte?"""

import argparse

from ppo_vs_dpo.artifacts.errors import in_help, printable, say
from ppo_vs_dpo.artifacts.files import read_marker
from ppo_vs_dpo.artifacts.guards.locks import hold, run_lock
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder


def main(arguments: list[str]) -> int:
    """``ppo-vs-dpo verify RUN [--mend]``; 0 where all is whole, 1 where something is not."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo verify", description=in_help(__doc__))
    parser.add_argument("run", help="a run folder")
    parser.add_argument(
        "--mend", action="store_true", help="mark what is not whole as not done: the same command makes it again"
    )
    given = parser.parse_args(arguments)
    run = RunFolder(given.run)
    with hold(run_lock(run.root), str(run.root)):
        text, damaged = verify(run)
        say(text)
        if damaged and given.mend:
            for name in damaged:
                marker = run.stage_dir(name) / "done.json"
                marker.replace(marker.with_name("done.json.damaged"))
            say("Marked as not done: the same command as before makes it again.\n")
        elif damaged:
            say("--mend marks it as not done: the same command as before then makes it again.\n")
    return 1 if damaged else 0


def verify(run: RunFolder) -> tuple[str, list[str]]:
    """A line a stage, and the names of those that are not what was written."""
    names = [*STAGES, *sorted(folder.name for folder in run.path("sweep").glob("*,*"))]
    lines, damaged = [], []
    for name in names:
        done = read_marker(run.stage_dir(name) / "done.json")
        if done is None:
            lines.append(f"{name}: not done")
            continue
        found = run.damage(name, done, hashes=True)
        listed = done.get("outputs") or {}
        size = sum(entry.get("bytes", 0) for entry in listed.values()) if isinstance(listed, dict) else 0
        damaged += [name] if found else []
        lines.append(f"{name}: {'; '.join(found) if found else f'{len(listed)} files, {size:,} bytes: as written'}")
    return printable("\n".join(lines)) + "\n", damaged
