"""The command ``ppo-vs-dpo``: from preference pairs to a verdict."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, explain_os_error
from ppo_vs_dpo.artifacts.run import STAGES

HELP = f"""\
From preference pairs to a verdict: SFT, reward model, PPO, DPO, best-of-n, compared on the same pairs.

  ppo-vs-dpo experiment=NAME [key=value ...]     run it; finished stages are skipped, interrupted ones resumed
  ppo-vs-dpo -m experiment=NAME seed=1,2,3       one run for each value (Hydra's sweep)
  ppo-vs-dpo list                                the experiments, a line each
  ppo-vs-dpo show experiment=NAME [key=value]    the resolved configuration, every key with its comment
  ppo-vs-dpo plan experiment=NAME --gpus 8       memory for each role, time at best, and whether it fits
  ppo-vs-dpo data inspect SOURCE                 what is in a preference data set, and what is wrong with it
  ppo-vs-dpo iterate RUN --rounds 3              iterative DPO: sample, score, pair, train, repeat, from a finished run
  ppo-vs-dpo compare RUN [RUN ...]               pool finished runs (seeds, sweeps) into one report
  ppo-vs-dpo --help | --version

Often used
  stages=[ppo,compare]      only these of {", ".join(STAGES)}
  seed=3  name=NAME  output_dir=DIR
  model=pretrained model.path=DIR_OR_HUB_NAME      data=files data.path=FILE
  ppo.kl_coef=0.1  dpo.beta=0.1  sft.learning_rate=1e-5     (any field of TRL's and transformers' argument classes)
  launch.workers=2          stages at once on this machine;  launch.processes=8: ranks of a training stage
  --config-dir DIR          experiments of your own: DIR/experiment/NAME.yaml

Each stage alone: python -m ppo_vs_dpo.reward_model RUN_FOLDER
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(arguments)
    except UserError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on from here.\n")
        code = 130
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        sys.stderr.write(f"\nerror: {explained}\n")
        code = 2
    sys.exit(code)


def dispatch(arguments: list[str]) -> int:
    """Find out what is asked for and do it."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        sys.stdout.write(HELP)
        return 0
    if arguments[0] == "--version":
        from ppo_vs_dpo.pipeline.running.manifest import versions

        sys.stdout.write(f"ppo-vs-dpo {versions()['ppo-vs-dpo']}\n")
        return 0
    first, rest = arguments[0], arguments[1:]
    if first == "list":
        from ppo_vs_dpo.pipeline.composing.show import list_experiments

        sys.stdout.write(list_experiments())
        return 0
    if first == "show":
        from ppo_vs_dpo.pipeline.composing.show import show

        sys.stdout.write(show(with_config_dir(rest)))
        return 0
    if first == "data":
        if rest[:1] != ["inspect"]:
            raise UserError("usage: ppo-vs-dpo data inspect SOURCE")
        from ppo_vs_dpo.preferences.reading.inspect import main as inspect

        return inspect(rest[1:]) or 0
    if first == "plan":
        from ppo_vs_dpo.pipeline.planning.plan import main as plan

        return plan(rest)
    if first == "iterate":
        from ppo_vs_dpo.preferences.recipes.iterative_dpo import main as iterate

        return iterate(rest)
    if first == "compare":
        from ppo_vs_dpo.compare.pooled.runs import main as compare_several

        return compare_several(rest) or 0
    if first in ("-m", "--multirun"):
        return sweep(with_config_dir(rest))
    unknown = [item for item in arguments if item.startswith("-") and not item.startswith("--config-dir")]
    if unknown:
        raise UserError(f"unknown option {unknown[0]}. `ppo-vs-dpo --help` lists them.")
    return run_one(with_config_dir(arguments))


def with_config_dir(arguments: list[str]) -> list[str]:
    """Turn ``--config-dir DIR`` into Hydra's search path, so that it works for sweeps as well."""
    overrides, folders = [], []
    rest = iter(arguments)
    for item in rest:
        if item == "--config-dir":
            folders.append(next(rest, ""))
        elif item.startswith("--config-dir="):
            folders.append(item.partition("=")[2])
        else:
            overrides.append(item)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder.")
    if folders:
        places = ",".join(f"file://{Path(folder).resolve()}" for folder in folders)
        overrides.append(f"hydra.searchpath=[{places}]")
    return overrides


def run_one(overrides: list[str]) -> int:
    """Compose one configuration and run it."""
    from ppo_vs_dpo.pipeline.composing.compose import load
    from ppo_vs_dpo.pipeline.running.run import run_pipeline

    return run_pipeline(load(overrides))


def sweep(overrides: list[str]) -> int:
    """Run once for each combination of the swept values, by Hydra's sweeper and launcher."""
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ppo_vs_dpo.pipeline.composing.compose import prepare_overrides
    from ppo_vs_dpo.pipeline.composing.schema import CONFIGS

    prepared = prepare_overrides(overrides)
    # Runs are named after what differs between them; Hydra carries the rest to the jobs as keys to leave out.
    fixed = [
        one.key_or_group for one in OverridesParser.create().parse_overrides(prepared) if not one.is_sweep_override()
    ]
    leave_out = "hydra.job.config.override_dirname.exclude_keys=[" + ",".join(f"'{key}'" for key in fixed) + "]"
    sys.argv = ["ppo-vs-dpo", "--multirun", *prepared, leave_out]
    hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(sweep_job)()
    return 0


def sweep_job(config: DictConfig) -> None:
    """One job of a sweep; runs wherever Hydra's launcher puts it."""
    from hydra.core.hydra_config import HydraConfig

    from ppo_vs_dpo.pipeline.composing.compose import finish
    from ppo_vs_dpo.pipeline.running.run import run_pipeline

    hydra_config = HydraConfig.get()
    OmegaConf.set_struct(config, False)
    fixed = set(hydra_config.job.config.override_dirname.exclude_keys) - {"seed"}
    naming = [one for one in hydra_config.overrides.task if one.lstrip("+").partition("=")[0] not in fixed]
    resolved = finish(config, hydra_config.runtime.choices.get("experiment"), naming, multirun=True)
    run_pipeline(resolved)


if __name__ == "__main__":
    main()
