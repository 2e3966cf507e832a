"""``ppo-vs-dpo -m``: one run for each combination of the swept values, and at the end what to do with them."""

import os
import shlex
import sys
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, say, warn
from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl

# Combinations that are composed and checked before the first of them runs; each takes a tenth of a second.
CHECKED = 200
# Beside multirun.yaml, Hydra's own record of a sweep.
RECORD = "runs.jsonl"
# Where Hydra puts this sweep's record: found out when it starts, since the name holds the time.
_folders: list[Path] = []


class Noted(Callback):
    """Hydra's callback that notes where the sweep's record will lie."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _folders.append(Path(config.hydra.sweep.dir))


def sweep(overrides: list[str]) -> int:
    """Run once for each combination of the swept values, by Hydra's sweeper and launcher.

    Raises:
        UserError: a combination that cannot run (before any has run), or a run that failed.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from ppo_vs_dpo.pipeline.composing.compose import explain, prepare_overrides
    from ppo_vs_dpo.pipeline.composing.schema import CONFIGS
    from ppo_vs_dpo.pipeline.composing.words import everywhere

    prepared = prepare_overrides(overrides)
    parsed = OverridesParser.create().parse_overrides(prepared)
    typed = OverridesParser.create().parse_overrides(everywhere(overrides))
    swept = [one for one in typed if one.is_sweep_override()]
    total = None
    if all(one.is_discrete_sweep() for one in swept):
        choices = [[f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] for one in swept]
        total = check_all([one.input_line for one in typed if not one.is_sweep_override()], choices)
    # Runs are named after what differs between them; Hydra carries the rest to the jobs as keys to leave out.
    fixed = [one.key_or_group for one in parsed if not one.is_sweep_override()]
    leave_out = "hydra.job.config.override_dirname.exclude_keys=[" + ",".join(f"'{key}'" for key in fixed) + "]"
    noted = f"+hydra.callbacks.noted._target_={__name__}.Noted"
    sys.argv = ["ppo-vs-dpo", "--multirun", *prepared, leave_out, noted]
    if total:
        os.environ["PPO_VS_DPO_SWEEP_SIZE"] = str(total)
    # Hydra would print a traceback and exit; errors are ours to word.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(sweep_job)()
    except HydraException as error:
        raise UserError(explain(error)) from None
    finally:
        say(last_word(_folders[-1] if _folders else None))
    return 0


def check_all(fixed: list[str], choices: list[list[str]]) -> int:
    """Compose every combination, the first `CHECKED` of them, before any of them runs; returns how many there are."""
    from ppo_vs_dpo.pipeline.composing.compose import load

    total = 1
    for values in choices:
        total *= len(values)
        if twice := sorted({one for one in values if values.count(one) > 1}):
            raise UserError(f"{twice[0]} stands twice among the swept values: both jobs would use one folder.")
    for combination in islice(product(*choices), CHECKED):
        try:
            load([*fixed, *combination])
        except UserError as error:
            with_these = f"with {' '.join(combination)}: " if combination else ""  # -m with nothing swept
            raise UserError(f"{with_these}{error}") from None
    return total


def sweep_job(config: DictConfig) -> None:
    """One job of a sweep; runs wherever Hydra's launcher puts it."""
    from hydra.core.hydra_config import HydraConfig

    from ppo_vs_dpo.pipeline.composing.compose import chosen, finish
    from ppo_vs_dpo.pipeline.running.command import run_pipeline

    hydra_config = HydraConfig.get()
    OmegaConf.set_struct(config, False)
    fixed = set(hydra_config.job.config.override_dirname.exclude_keys) - {"seed"}
    naming = [one for one in hydra_config.overrides.task if one.lstrip("+").partition("=")[0] not in fixed]
    resolved = finish(
        config,
        chosen(dict(hydra_config.runtime.choices)),
        naming,
        multirun=True,
        emptied=list(hydra_config.overrides.task),
    )
    folder = Path(resolved.output_dir) / resolved.name
    total = os.environ.get("PPO_VS_DPO_SWEEP_SIZE")
    of = f" of {total}" if total else ""
    say(f"\nrun {int(hydra_config.job.num) + 1}{of}: {folder}\n")
    try:
        run_pipeline(resolved)
    except UserError as error:  # the other runs go on, and Hydra tells the first failure alone, at the end
        warn(f"\n{folder}: {error}\n")
        raise
    if "compare" in resolved.stages:
        append_jsonl(Path(hydra_config.sweep.dir) / RECORD, {"run": str(folder)})


def last_word(folder: Path | None) -> str:
    """What a sweep ends with: its finished runs, and the command that pools them."""
    record = folder / RECORD if folder is not None else None
    if record is None or not record.is_file():
        return ""
    runs = sorted({row["run"] for row in read_jsonl(record)})
    text = "\n".join([f"\n{len(runs)} run{'s' if len(runs) != 1 else ''} of this sweep finished:", *runs])
    if len(runs) > 1:
        text += (
            f"\n\nOne report of all, where they differ in their seed only:\n  ppo-vs-dpo compare {shlex.join(runs)}"
        )
    return text + "\n"
