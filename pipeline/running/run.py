"""One run from its configuration to its verdict."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running import graph
from ppo_vs_dpo.pipeline.running.execute import execute, locked
from ppo_vs_dpo.pipeline.running.manifest import write_manifest
from ppo_vs_dpo.pipeline.running.overview import Overview, verdict
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
            refused a model.
    """
    for stage in config.stages:
        wanted(config, stage)  # a push without a name is refused now, not after hours
    folder = Path(config.output_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, config)
    run = RunFolder(folder)
    with locked(run):
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        run = RunFolder(folder)
        jobs = graph.build(run)
        todo = graph.select(jobs, list(config.stages))
        chosen = [job for job in jobs if job.stage in config.stages]
        if todo:
            write_manifest(run)
            with Overview(run, chosen) as overview:
                execute(run, todo, overview)
            write_manifest(run)
        else:
            sys.stdout.write(f"{folder}: everything is done; nothing changed.\n")
        say_verdict(run)
        publish(run, list(config.stages))
    return 0


def claim(folder: Path, config: DictConfig) -> None:
    """Make sure that a folder is this run's own.

    Raises:
        UserError: it holds the run of another experiment, seed, model or data set; names what differs.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        write_text(path, OmegaConf.to_yaml(config))
        return
    there = RunFolder(folder).config
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


def say_verdict(run: RunFolder) -> None:
    """Print what `compare` concluded and where the report is."""
    report = run.path("compare", "report.html")
    if run.done("compare") is None or not report.is_file():
        return
    sentences = verdict(run)
    sys.stdout.write("\n" + "\n".join(sentences) + ("\n\n" if sentences else "") + f"Report: {report}\n")
