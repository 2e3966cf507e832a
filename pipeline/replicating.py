"""``ppo-vs-dpo paper``: what papers claim, full configurations, and miniatures that show whether a claim holds."""

import argparse
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say, warn
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.papers.miniature import FOLDER, Miniature, run, stored
from ppo_vs_dpo.papers.page import Checked, description, document, markdown, overview, write_pages
from ppo_vs_dpo.papers.paper import Paper, paper, papers
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE, file_of, full_settings, unknown
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of


def checked(one: Paper, folder: Path) -> Checked:
    """A paper with the reports that are there."""
    if not (CONFIGS / one.name / f"{MINIATURE}.yaml").is_file():
        return Checked(one, None, [])
    miniature = Miniature.load(one.name)
    return Checked(one, miniature, stored(folder, one, miniature))


def run_miniature(one: Paper, folder: Path) -> Checked:
    """Make the reports that are missing, check the claims, write the pages."""

    def pipeline(overrides: list[str], seed: int) -> Path:
        from ppo_vs_dpo.pipeline.composing.compose import load
        from ppo_vs_dpo.pipeline.running.command import run_pipeline

        config = load([*overrides, f"seed={seed}", f"output_dir={folder / 'runs'}"])
        run_pipeline(config)
        return Path(config.output_dir) / config.name

    miniature = Miniature.load(one.name)
    reports = run(one, miniature, folder, pipeline, say=lambda text: warn(f"{text}\n"))
    done = Checked(one, miniature, reports)
    write_pages(folder / one.name, done)
    return done


def run_full(one: Paper, setting: str | None, overrides: list[str], gpu: str, gpus: int | None) -> int:
    """Say what a full configuration takes, then run it.

    Raises:
        UserError: which of several is not said, a number that nobody published is not set, or it does not fit.
    """
    names = full_settings(one.name)
    if not names:
        raise UserError(f"{one.name} has no full configuration: {one.takes}.")
    if setting is None and len(names) != 1:
        raise UserError(f"{one.name} has {len(names)} full configurations; name one: --full {'|'.join(names)}.")
    setting = setting or names[0]
    path = file_of(one.name, setting)
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    open_keys = {key: note for key, note in unknown(path).items() if key not in given}
    if open_keys:
        listed = "\n  ".join(f"{key}: {note}" for key, note in open_keys.items())
        raise UserError(
            f"nobody published what {one.name}/{setting} needs here; set each on the command line (KEY=VALUE):"
            f"\n  {listed}"
        )
    from ppo_vs_dpo.pipeline.composing.compose import load
    from ppo_vs_dpo.pipeline.planning.plan import main as plan
    from ppo_vs_dpo.pipeline.running.command import run_pipeline

    words = [f"paper={one.name}/{setting}", *overrides]
    config = load(words)
    if plan([*words, "--gpu", gpu, *(["--gpus", str(gpus)] if gpus else [])]):
        ranks = gpus or ranks_of(config.launch)
        raise UserError(
            f"{one.name}/{setting} does not fit {ranks} x {gpu}; the plan above says what would."
            f" Name other hardware with --gpu and --gpus, or change the configuration."
        )
    return run_pipeline(config)


def main(arguments: list[str]) -> int:
    """``ppo-vs-dpo paper list | show NAME | run NAME``; 0."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo paper", description=in_help(__doc__.splitlines()[0]))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where miniatures run (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every paper: question, what it takes, whether its claims held in miniature")
    show = commands.add_parser("show", help="claims, sources, what is unknown, configurations")
    show.add_argument("name")
    go = commands.add_parser("run", help="the miniature, then the check of each claim; --full: the real thing")
    go.add_argument("name", nargs="?")
    go.add_argument("overrides", nargs="*", help="with --full: key=value ...")
    go.add_argument("--all", action="store_true", help="every paper that has a miniature")
    go.add_argument("--table", type=Path, metavar="FILE", help="then write the table of all papers there")
    go.add_argument("--full", nargs="?", const="", metavar="SETTING", help="the full configuration of that name")
    go.add_argument("--gpu", default="h100-80gb", help="for the plan of --full (default: %(default)s)")
    go.add_argument("--gpus", type=int, help="for the plan of --full (default: launch.processes x launch.nodes)")
    given = parser.parse_args(arguments)
    folder = given.folder
    if given.command == "list":
        say(overview([checked(one, folder) for one in papers()]))
        return 0
    if given.command == "show":
        say(description(paper(given.name)))
        return 0
    if given.full is not None:
        if given.all or not given.name:
            raise UserError("usage: ppo-vs-dpo paper run NAME --full [SETTING] [key=value ...]")
        return run_full(paper(given.name), given.full or None, given.overrides, given.gpu, given.gpus)
    if given.overrides:
        raise UserError(f"a miniature's settings are fixed; {given.overrides[0]} is for --full.")
    if given.all:
        chosen = [one for one in papers() if (CONFIGS / one.name / f"{MINIATURE}.yaml").is_file()]
    elif given.name:
        chosen = [paper(given.name)]
    elif given.table:
        chosen = []
    else:
        raise UserError("which paper? Give its name, or --all.")
    for one in chosen:
        done = run_miniature(one, folder)
        say(f"{markdown(done)}\nPage: {folder / one.name / 'report.html'}\n\n")
    if given.table:
        write_text(given.table, document([checked(one, folder) for one in papers()]))
    return 0
