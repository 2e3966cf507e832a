"""``ppo-vs-dpo check``: would this run start, stage by stage? All complaints at once, in seconds, and nothing changed.

A run does the same first. What needs TRL's classes is done in a process of its own, so that the command stays small.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import Complaint, UserError, printable, say
from ppo_vs_dpo.artifacts.files import read_marker, sha256_of, write_json
from ppo_vs_dpo.artifacts.guards.processes import die_with_parent
from ppo_vs_dpo.artifacts.guards.versions import made_by
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder
from ppo_vs_dpo.pipeline.composing.compose import load

# Seconds after which the look at the arguments is given up; a stage will then say itself what is wrong.
PATIENCE = 300.0


def load_checked(overrides: list[str], launcher: Callable[[Any], Any]) -> DictConfig:
    """`compose.load`; where that complains, all that the stages would refuse besides is said with it.

    Not where names alone are wrong: that costs no libraries, and what a mistyped key was to say is not known yet.

    Raises:
        UserError: all of it at once.
    """
    try:
        return load(overrides)
    except Complaint as error:
        if all(": no such key." in line for line in error.problems):
            raise
        raise Complaint([*error.problems, *beyond(error, launcher)]) from None


def beyond(error: Complaint, launcher: Callable[[Any], Any]) -> list[str]:
    """What a check finds in a configuration that was not composed well, of keys that nothing was said of yet."""
    config = error.config
    if config is None:
        return []
    try:
        OmegaConf.resolve(config)
        check_run(config, [stage for stage in config.get("stages") or [] if stage in STAGES], launcher)
    except Complaint as more:
        known = {_key(line) for line in error.problems}
        return [line for line in more.problems if _key(line) not in known and "???" not in line]
    except (UserError, OmegaConfBaseException):
        return []
    return []


def _key(line: str) -> str:
    """The dotted key that a sentence begins with."""
    return re.split(r"[ :=\[]", line, maxsplit=1)[0]


def check_run(
    config: DictConfig, stages: list[str], launcher: Callable[[Any], Any], environment: dict[str, str] | None = None
) -> None:
    """Look at everything that the stages to do would refuse.

    Args:
        launcher: refuses a section ``launch`` by which nothing can be started (`pipeline.running.launch`).

    Raises:
        UserError: all of it at once.
    """
    say("looking at settings, data and models (some seconds) ...\n")
    sys.stdout.flush()
    found = [*no_folder(Path(config.output_dir) / config.name), *problems_of(config, stages, environment)]
    try:
        launcher(config.launch)
    except UserError as error:
        found.append(str(error))
    if found:
        raise Complaint([printable(one) for one in found])


def check_once(
    run: RunFolder,
    stages: dict[str, str],
    launcher: Callable[[Any], Any],
    environment: dict[str, str] | None = None,
) -> None:
    """`check_run`, unless all of this was found in order by the same code before.

    What a run still has to do gets less from one command to the next: stages that were looked at among others count.

    Args:
        stages: those that are to run, each with the hash of all that it depends on: a file that it names and that is
            gone or another one since is looked at again.

    Raises:
        UserError: all that is wrong.
    """
    settings = OmegaConf.to_container(run.config, resolve=True)
    key = sha256_of([{name: value for name, value in settings.items() if name != "stages"}, made_by()])
    place = run.cache("checked.json")
    before = read_marker(place, set_aside=True, keys={"settings": str, "in_order": dict}) or {}
    known = before["in_order"] if before.get("settings") == key else {}
    if any(known.get(stage) != fingerprint for stage, fingerprint in stages.items()):
        check_run(run.config, list(stages), launcher, environment)
        write_json(place, {"settings": key, "in_order": {**known, **stages}})


def no_folder(folder: Path) -> list[str]:
    """Why a run's folder cannot be made or written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return [f"output_dir: {there} is a file, and {folder} would lie in it. Move it away, or choose another place."]
    if not os.access(there, os.W_OK):
        return [f"output_dir: {there} may not be written here. Choose another place."]
    return []


def problems_of(config: DictConfig, stages: list[str], environment: dict[str, str] | None = None) -> list[str]:
    """What the stages would refuse, a sentence each."""
    question = {"config": OmegaConf.to_container(config, resolve=True), "stages": stages}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "ppo_vs_dpo.pipeline.checking.inputs"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env=environment,
            preexec_fn=die_with_parent,
        )
    except subprocess.TimeoutExpired:
        return []
    answer = ended.stdout.strip().splitlines()
    if ended.returncode != 0 or not answer:
        raise UserError(
            f"the settings could not be looked at: {(ended.stderr.strip().splitlines() or ['no answer'])[-1]}"
        )
    return json.loads(answer[-1])


def main(arguments: list[str], launcher: Callable[[Any], Any]) -> int:
    """``ppo-vs-dpo check NAME [key=value ...]``; 0 where it would run, 2 with all that it would refuse."""
    config: Any = load_checked(arguments, launcher)
    folder = Path(config.output_dir) / config.name
    check_run(config, list(config.stages), launcher)
    say(f"{folder}: {', '.join(config.stages)} would start; nothing was run and nothing written.\n")
    return 0
