"""The command ``ppo-vs-dpo``: from preference pairs to a verdict."""

import signal
import sys
import threading
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError, explain_os_error, printable, say, warn
from ppo_vs_dpo.artifacts.guards.processes import lose_no_interrupt
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder
from ppo_vs_dpo.pipeline.composing.words import experiments, with_experiment

HELP = f"""\
From preference pairs to a verdict: SFT, reward model, PPO, DPO, best-of-n, compared on the same pairs.

  ppo-vs-dpo NAME [key=value ...]                run an experiment; what is finished is skipped, the rest goes on
  ppo-vs-dpo -m NAME seed=1,2,3                  one run for each value (Hydra's sweep)
  ppo-vs-dpo list                                the experiments, a line each
  ppo-vs-dpo show NAME [key=value ...]           the resolved configuration, every key with its comment
  ppo-vs-dpo plan NAME --gpus 8                  memory for each role, time at best, and whether it fits
  ppo-vs-dpo data inspect SOURCE                 what is in a preference data set, and what is wrong with it
  ppo-vs-dpo iterate RUN --rounds 3              iterative DPO: sample, score, pair, train, repeat, from a finished run
  ppo-vs-dpo paper list | show NAME | run NAME   papers: full configurations, miniatures, which claims hold
  ppo-vs-dpo compare RUN [RUN ...]               pool finished runs (seeds, sweeps) into one report
  ppo-vs-dpo compare --policy a=MODEL --policy b=outputs.jsonl --judge my.py:score ...   your own models or outputs
  ppo-vs-dpo check NAME [key=value ...]          would every stage start? In seconds; nothing is run or written
  ppo-vs-dpo verify RUN [--mend]                 are all results what was written? Reads every byte
  ppo-vs-dpo doctor                              this machine: versions, GPUs, network, disks, and what is wrong
  ppo-vs-dpo clean RUN                           what may be deleted, and what is lost with it
  ppo-vs-dpo --help | --version

Often used
  stages=[ppo,compare]      only these of {", ".join(STAGES)}
  seed=3  name=NAME  output_dir=DIR  report_to=wandb
  model=pretrained model.path=DIR_OR_HUB_NAME      data=files data.path=FILE
  ppo.kl_coef=0.1  dpo.beta=0.1  sft.learning_rate=1e-5     (any field of TRL's and transformers' argument classes)
  launch.workers=2          stages at once on this machine;  launch.processes=8: ranks of a training stage
  --config-dir DIR          experiments of your own: DIR/experiment/NAME.yaml
  --accept-version          go on with a run that another version began
  --profile                 at the end, where the time of each stage went

Each stage alone: python -m ppo_vs_dpo.reward_model RUN_FOLDER
"""

COMMANDS = ("list", "show", "plan", "data", "iterate", "paper", "compare", "clean", "check", "verify", "doctor")
# Options of a run, and the keys that they stand for.
OPTIONS = {"--accept-version": "launch.accept_version=true", "--profile": "launch.profile=true"}
# Commands with options, and a help, of their own.
ASKED = ("plan", "data", "iterate", "paper", "compare", "clean", "doctor", "verify")
# The others, each in a paragraph.
WORDS = {
    "list": "ppo-vs-dpo list: the experiments, a line each. `ppo-vs-dpo show NAME` has the settings of one.",
    "show": """\
ppo-vs-dpo show NAME [key=value ...]

The resolved configuration, every key with its comment above it. NAME is an experiment (ppo-vs-dpo list); what is typed
behind it is taken in. Nothing is run or written.""",
    "check": """\
ppo-vs-dpo check NAME [key=value ...]

Would every stage start? Types and ranges of all settings, functions, models, the first rows of files: all complaints
at once, in seconds. Nothing is run or written. A run does the same before its first stage.""",
    "run": """\
ppo-vs-dpo run NAME [key=value ...], or without `run`

Runs an experiment. What is finished is skipped, what was interrupted goes on. `ppo-vs-dpo show NAME` has every
setting, `ppo-vs-dpo check NAME ...` looks without running, `ppo-vs-dpo --help` lists the commands.""",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    interrupt_on_termination()
    try:
        code = dispatch(arguments)
    except (KeyboardInterrupt, Exception) as error:
        # A library may have made another error of Ctrl-C (`__main__.Interrupt`).
        if isinstance(error, KeyboardInterrupt) or getattr(signal.getsignal(signal.SIGINT), "heard", False):
            warn("\ninterrupted; the same command goes on, a stage from its last checkpoint.\n")
            sys.exit(130)
        explained = explain_os_error(error) if isinstance(error, OSError) else str(error)
        if explained is None or not isinstance(error, UserError | OSError):
            raise
        warn(f"\nerror: {printable(explained)}\n")
        code = 2
    sys.exit(code)


def interrupt_on_termination() -> None:
    """Let SIGTERM (a scheduler's) and SIGHUP (a closed terminal) stop the command as Ctrl-C does.

    A signal that the caller ignores (`nohup`) stays ignored.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    lose_no_interrupt()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, interrupt)


def dispatch(arguments: list[str]) -> int:
    """Find out what is asked for and do it."""
    asks = bool({"--help", "-h"} & {*arguments})
    if not arguments or arguments[0] in ("help", "--help", "-h") or (asks and arguments[0] not in ASKED):
        command = "run" if asks and arguments[0] in experiments() else (arguments or [""])[0]
        say(f"{WORDS[command]}\n" if asks and command in WORDS else HELP)
        return 0
    if arguments[0] == "--version":
        from ppo_vs_dpo.artifacts.guards.versions import versions

        say(f"ppo-vs-dpo {versions()['ppo-vs-dpo']}\n")
        return 0
    first, rest = arguments[0], arguments[1:]
    if first == "list":
        from ppo_vs_dpo.pipeline.composing.show import list_experiments

        say(list_experiments())
        return 0
    if first == "show":
        from ppo_vs_dpo.pipeline.composing.show import show

        say(show(with_experiment(with_config_dir(rest))))
        return 0
    if first == "data":
        if rest[:1] != ["inspect"] and not asks:
            raise UserError("usage: ppo-vs-dpo data inspect SOURCE")
        from ppo_vs_dpo.preferences.reading.inspect import main as inspect

        return inspect(rest[1:] if rest[:1] == ["inspect"] else ["--help"]) or 0
    if first == "plan":
        from ppo_vs_dpo.pipeline.planning.plan import main as plan

        return plan(with_experiment(rest))
    if first == "doctor":
        from ppo_vs_dpo.pipeline.checking.doctor import main as doctor

        return doctor(rest)
    if first == "iterate":
        from ppo_vs_dpo.preferences.recipes.iterative_dpo import main as iterate

        return iterate(rest)
    if first == "compare":
        from ppo_vs_dpo.pipeline import comparing

        if comparing.wanted(rest):
            return comparing.main(rest)
        if not rest[0].startswith("-"):
            RunFolder(rest[0])  # a folder that is not there is known before libraries are loaded
        from ppo_vs_dpo.compare.pooled.runs import main as compare_several

        return compare_several(rest) or 0
    if first == "paper":
        from ppo_vs_dpo.pipeline.replicating import main as paper

        return paper(rest)
    if first == "clean":
        from ppo_vs_dpo.pipeline.cleaning import main as clean

        return clean(rest)
    if first == "check":
        from ppo_vs_dpo.pipeline.checking.check import main as check
        from ppo_vs_dpo.pipeline.running.launch import launcher

        return check(with_experiment(with_config_dir(rest)), launcher)
    if first == "verify":
        from ppo_vs_dpo.pipeline.checking.verify import main as verify

        return verify(rest)
    if first in ("-m", "--multirun"):
        from ppo_vs_dpo.pipeline.sweep import sweep

        return sweep(with_experiment(with_config_dir(rest)))
    if first == "run":
        first, arguments = next(iter(rest), ""), rest
    mine = ("--config-dir", *OPTIONS)
    unknown = [item for item in arguments if item.startswith("-") and not item.startswith(mine)]
    if unknown:
        plain = (
            f"Settings have no dashes: {unknown[0].lstrip('-')}" if "=" in unknown[0] else "Try `ppo-vs-dpo --help`"
        )
        raise UserError(f"unknown option {unknown[0]}. {plain}")
    return run_one(with_experiment(with_config_dir(arguments), COMMANDS))


def with_config_dir(arguments: list[str]) -> list[str]:
    """Turn ``--config-dir DIR`` into Hydra's search path, other options into their keys, for sweeps as well."""
    overrides, folders = [], []
    rest = iter(arguments)
    for item in rest:
        if item == "--config-dir":
            folders.append(next(rest, ""))
        elif item.startswith("--config-dir="):
            folders.append(item.partition("=")[2])
        elif item in OPTIONS:
            overrides.append(OPTIONS[item])
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
    from ppo_vs_dpo.pipeline.checking.check import load_checked
    from ppo_vs_dpo.pipeline.running.command import run_pipeline
    from ppo_vs_dpo.pipeline.running.launch import launcher

    return run_pipeline(load_checked(overrides, launcher))


if __name__ == "__main__":
    main()
