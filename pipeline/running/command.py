"""One run from its configuration to its verdict."""

import contextlib
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, say, warn
from ppo_vs_dpo.artifacts.files import read_marker, sha256_of, write_text
from ppo_vs_dpo.artifacts.guards import replaced
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.versions import differences, made_by
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder
from ppo_vs_dpo.pipeline.checking.check import check_once
from ppo_vs_dpo.pipeline.checking.doctor import before_cluster
from ppo_vs_dpo.pipeline.planning.cost.beforehand import say_cost
from ppo_vs_dpo.pipeline.planning.gpus import visible
from ppo_vs_dpo.pipeline.running import graph
from ppo_vs_dpo.pipeline.running.execute import execute, locked
from ppo_vs_dpo.pipeline.running.job import environment, fork_server
from ppo_vs_dpo.pipeline.running.launch import launcher
from ppo_vs_dpo.pipeline.running.manifest import write_manifest
from ppo_vs_dpo.pipeline.running.overview import Overview, verdict
from ppo_vs_dpo.pipeline.running.profile import write_profile
from ppo_vs_dpo.pipeline.running.publish import publish, wanted

# Settings that make two runs different runs. Others may change: the stages behind them are then stale.
IDENTITY = ("experiment", "seed", "model.path", "data.source", "data.path")


def run_pipeline(config: DictConfig) -> int:
    """Run what is to do of a configuration.

    Args:
        config: resolved and checked, from `pipeline.composing.compose.load`.

    Returns:
        0.

    Raises:
        UserError: the folder holds another run or is in use; a stage failed (with the stage's own words); the Hub
            refused a model; the run was begun by other code.
    """
    for stage in config.stages:
        wanted(config, stage)  # a push without a name is refused now, not after hours
    folder = Path(config.output_dir) / config.name
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _run(folder, config)
    except UserError:
        with contextlib.suppress(OSError):  # what is refused leaves nothing behind
            for one in made:
                one.rmdir()
        raise


def _run(folder: Path, config: DictConfig) -> int:
    with locked(folder), contextlib.ExitStack() as held:
        claim(folder, config)
        # Nothing is written before all is looked at: a wrong value costs nothing that is there.
        run = RunFolder(folder, config)
        digests = Digests(run.cache("digests.json"))
        jobs = graph.build(run, digests)
        todo = graph.select(run, jobs, list(config.stages))
        work = [job for job in todo if not finished_before(job)]
        server = None
        if work:
            check_versions(run, jobs, work)
            if of_a_cluster(config.launch):
                warn(before_cluster(config.output_dir))
            if (server := fork_server(run, work)) is not None:
                held.enter_context(server)
            check_once(run, depends_on(jobs, work), launcher, environment(config, "check"))
        digests.save()
        if len(work) < len(todo):
            write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
            bring_back(run, todo)
            jobs = graph.build(run)
            todo = graph.select(run, jobs, list(config.stages))
        chosen = [job for job in jobs if job.stage in config.stages]
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        if todo:
            write_manifest(run)
            said, estimates = say_cost(run, [job.name for job in todo], environment(run.config, "measured"))
            say(said)
            sys.stdout.flush()
            with Overview(run, chosen, estimates=estimates) as overview:
                execute(run, todo, overview, server)
            write_manifest(run)
        else:
            make_whole(run, jobs)
            say(f"{folder}: everything is done; nothing changed.\n")
        if config.launch.get("profile"):
            write_profile(run, [job.name for job in chosen], server.spent if server is not None else None)
        say_end(run, next(job for job in graph.build(run) if job.name == "compare"))
        publish(run, list(config.stages))
    return 0


def make_whole(run: RunFolder, jobs: list[graph.Job]) -> None:
    """Write again what a finished run has lost beside its results: its manifest, and what each stage began with."""
    manifest = run.path("manifest.json")
    if read_marker(manifest, set_aside=True) is None:
        write_manifest(run)
        warn(f"{manifest} was gone or could not be read; it is written again.\n")
    for job in jobs:
        if job.state == "done":
            run.begun_again(job.name, job.made)


def depends_on(jobs: list[graph.Job], todo: list[graph.Job]) -> dict[str, str]:
    """The stages of jobs, each with a hash of all that it and the points of its sweep depend on."""
    names = dict.fromkeys(job.stage for job in todo)
    return {name: sha256_of([[job.name, job.fingerprint] for job in jobs if job.stage == name]) for name in names}


def finished_before(job: graph.Job) -> bool:
    """Whether this job needs no work: its result, made from just these settings, was moved aside since."""
    return job.kept is not None and (job.kept / "done.json").is_file()


def of_a_cluster(launch: DictConfig) -> bool:
    """Whether stages run on several machines, or on several GPUs of this one."""
    return bool(launch.get("hostfile")) or launch.get("nodes", 1) > 1 or (visible() and launch.processes != 1)


def bring_back(run: RunFolder, jobs: list[graph.Job]) -> None:
    """Put results in their places again that were made from just these settings and moved aside since.

    What had not finished is brought back by `RunFolder.begin`, when work on it goes on.
    """
    for job in jobs:
        if finished_before(job):
            replaced.bring_back(run.root, job.name, job.kept, run.stage_dir(job.name))
            say(f"{job.name}: the earlier result with these settings is back, from {job.kept}\n")


def check_versions(run: RunFolder, jobs: list[graph.Job], todo: list[graph.Job]) -> None:
    """Refuse to make a run of two versions without a word.

    Raises:
        UserError: what is to do goes on with, or reads, what other code or libraries made; names both.
    """
    here, by_name = made_by(), {job.name: job for job in jobs}
    reads, waiting = set(), [job.name for job in todo]
    while waiting:
        name = waiting.pop()
        if name not in reads:
            reads.add(name)
            waiting += by_name[name].needs
    found: dict[str, list[str]] = {}
    for job in jobs:
        if job.name in reads and (job.kept is not None or job.state in ("done", "part")):
            for made in run.made_by(job.name, job.kept):
                for difference in differences(made, here):
                    found.setdefault(difference, []).append(job.name)
    if not found or run.config.launch.get("accept_version"):
        return
    lines = [f"{', '.join(dict.fromkeys(names))}: {difference}" for difference, names in found.items()]
    raise UserError(
        "\n  ".join([f"{run.root} was begun with other code, and its stages would be of two versions:", *lines])
        + "\nGo on with --accept-version (manifest.json and the report then name both), go back to that version, or "
        "start anew under another name: name=..."
    )


def claim(folder: Path, config: DictConfig) -> None:
    """Make sure that a folder is this run's own. One in which nothing has been done yet is anybody's.

    Raises:
        UserError: it holds the run of another experiment, seed, model or data set; names what differs.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        there = RunFolder(folder).config
    except UserError as error:
        if "cannot be read" not in str(error):
            raise
        # What a stage was made from is in its own folder; this file is written anew.
        path.rename(path.with_name("config.yaml.unreadable"))
        warn(f"{error} It is now config.yaml.unreadable.\n")
        return
    if not any(replaced.worth_keeping(one) for one in [*(folder / s for s in STAGES), *folder.glob("sweep/*")]):
        return
    differences = [
        f"{key}: {OmegaConf.select(there, key)} there, {OmegaConf.select(config, key)} here"
        for key in IDENTITY
        if OmegaConf.select(there, key) != OmegaConf.select(config, key)
    ]
    if differences:
        raise UserError(
            "\n  ".join([f"{folder} holds another run:", *differences])
            + "\nChoose another folder with name=..., or delete that one."
        )


def say_end(run: RunFolder, compare: graph.Job) -> None:
    """The verdict; or that the one which is there is of other models or settings than the run has now."""
    report = run.path("compare", "report.html")
    if compare.state == "done":
        say_verdict(run)
    elif run.done("compare") is not None and report.is_file():
        why = f" ({compare.because} changed)" if compare.because else ""
        say(f"\nThe report is of earlier models or settings{why}: {report}\nThe stage compare makes it again.\n")


def say_verdict(run: RunFolder) -> None:
    """Print what `compare` concluded and where the report is."""
    report = run.path("compare", "report.html")
    if run.done("compare") is None or not report.is_file():
        return
    sentences = verdict(run)
    say("\n" + "\n".join(sentences) + ("\n\n" if sentences else "") + f"Report: {report}\n")
