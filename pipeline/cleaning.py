"""``ppo-vs-dpo clean RUN``: what a run folder holds that may go, and what is lost with it."""

import argparse
import shutil
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running.execute import locked

# Kind -> what is lost with it.
KINDS = {
    "checkpoints": "a finished stage could not be shown along its training (compare.checkpoints)",
    "replaced": "earlier results under other settings would have to be made again",
    "tensorboard": "the curves in TensorBoard; metrics.jsonl stays",
    "tokens": "token caches of the pairs; made again where needed",
    "cache": "completions and judges' replies: drawn, and paid for, again when compare runs again",
}
# Never removed but by name: it holds what was paid for.
ASKED_BY_NAME = ("cache",)


def found(run: RunFolder) -> dict[str, list[Path]]:
    """Folders of each kind; checkpoints of finished stages only, for the others go on from theirs."""
    stages = [
        folder for folder in [*run.root.glob("*"), *run.root.glob("sweep/*")] if (folder / "done.json").is_file()
    ]
    done = [folder for folder in stages if run.done(folder.name) is not None]
    places = {
        "checkpoints": [folder / "checkpoints" for folder in done],
        "replaced": list((run.root / ".replaced").glob("*")),
        "tensorboard": [folder / name for folder in done for name in ("tensorboard", "runs", "wandb")],
        "tokens": [folder / name for folder in done for name in ("tokens", "reference_logprobs")],
        "cache": [run.root / "cache"],
    }
    return {kind: [place for place in items if place.is_dir()] for kind, items in places.items()}


def size_of(folder: Path) -> int:
    """Bytes in a folder; what is linked from elsewhere takes none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo clean", description=in_help(__doc__))
    parser.add_argument("run", help="the run folder")
    parser.add_argument(
        "--remove", metavar="KIND,KIND", help=f"remove these: {', '.join(KINDS)}; all: every kind but cache"
    )
    given = parser.parse_args(arguments)
    run = RunFolder(given.run)
    wanted = given.remove.split(",") if given.remove else []
    if "all" in wanted:
        wanted = [kind for kind in KINDS if kind not in ASKED_BY_NAME]
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UserError(f"--remove {unknown[0]}: there is no such kind; there are {', '.join(KINDS)}.")
    with locked(run.root):
        places = found(run)
        sizes = {kind: sum(map(size_of, items)) for kind, items in places.items()}
        whole = size_of(run.root)
        say(f"{run.root}: {whole / 1e6:,.0f} MB\n")
        for kind, items in places.items():
            if items:
                verb = "removed" if kind in wanted else "may go"
                say(f"  {kind:<12}{sizes[kind] / 1e6:>9,.1f} MB  {verb}; lost: {KINDS[kind]}\n")
        for kind in wanted:
            for place in places[kind]:
                shutil.rmtree(place)
        rest = whole - sum(sizes.values())
        say(f"  {'the rest':<12}{rest / 1e6:>9,.1f} MB  models, data, figures, reports: stays\n")
        there = [kind for kind in KINDS if places[kind] and kind not in ASKED_BY_NAME]
        if there and not wanted:
            say(f"\nppo-vs-dpo clean {given.run} --remove {','.join(there)}\n")
    return 0
