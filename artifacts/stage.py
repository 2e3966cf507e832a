"""The frame around every stage: arguments, context, and what happens to errors, Ctrl-C and a full disk."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.card import write_card
from ppo_vs_dpo.artifacts.errors import UserError, warn
from ppo_vs_dpo.artifacts.files import read_marker, write_json
from ppo_vs_dpo.artifacts.guards import locks, refusals
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.fingerprints import NEEDS, fingerprint_of, points_of
from ppo_vs_dpo.artifacts.guards.processes import beat, die_with_parent, lose_no_interrupt, say_where_asked
from ppo_vs_dpo.artifacts.resources import BEFORE, cpu_seconds, lived, peak_memory, seconds_by_part
from ppo_vs_dpo.artifacts.run import RunFolder, point_name

# Seconds between two notes of the time spent so far: what a killed stage loses of its account.
SPENT_EVERY = 5.0
# In a stage's folder: the beats of ranks on several machines.
PULSE = "pulse"


class StageContext:
    """What a stage is given.

    Attributes:
        run: the run folder.
        stage: ``"ppo"``; the section of the configuration.
        name: ``"ppo"``, or ``"ppo,kl_coef=0.0"`` at a point of a sweep.
        point: ``{}``, or ``{"kl_coef": 0.0}``.
        dir: where this stage writes.
        config: the stage's section as a plain dict, the point applied, without the key ``sweep``.
        seed: the run's seed.

    Args:
        began: when the stage's process was started, by `time.monotonic`; now, where a process does other things, too.
    """

    def __init__(
        self,
        run: RunFolder,
        stage: str,
        point: dict[str, Any] | None = None,
        fingerprint: str | None = None,
        began: float | None = None,
    ):
        self.run, self.stage, self.point = run, stage, point or {}
        self.name = point_name(stage, self.point)
        self.dir = run.stage_dir(self.name)
        self.fingerprint = fingerprint
        section = run.config.get(stage)
        self.config: dict[str, Any] = OmegaConf.to_container(section, resolve=True) if section is not None else {}
        self.config.pop("sweep", None)
        unknown = [key for key in self.point if key not in self.config]
        if unknown:
            raise UserError(f"--point {unknown[0]}: {stage} has no such key in {run.path('config.yaml')}.")
        self.config.update(self.point)
        self.seed = int(run.config.get("seed", 0))
        self._started = time.monotonic() if began is None else began
        self._last_progress = 0.0
        self._spent_file = Path(self.dir) / "spent.json"
        # Time of an attempt that was interrupted counts; a stage that is run again after its end starts at 0.
        interrupted = self._spent_file.is_file() and run.done(self.name) is None
        spent = (read_marker(self._spent_file) or {}) if interrupted else {}
        self._spent_before, self._cpu_before = (
            float(spent[key]) if isinstance(spent.get(key), int | float) else 0.0 for key in ("seconds", "cpu_seconds")
        )
        self._last_spent = time.monotonic()
        self._counted: dict[str, float] = {}
        self._parts_before = {name: seconds for name, seconds in seconds_by_part().items() if name not in BEFORE}

    @property
    def is_main_process(self) -> bool:
        """True on the rank that writes."""
        return int(os.environ.get("RANK", "0")) == 0

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Tell the overview how far this stage is, at most five times a second."""
        now = time.monotonic()
        if not self.is_main_process or (now - self._last_progress < 0.2 and done < total):
            return
        self._last_progress = now
        write_json(self.dir / "progress.json", {"done": done, "total": total, "note": note})
        if now - self._last_spent > SPENT_EVERY:
            self._last_spent = now
            self.note_spent()

    @contextlib.contextmanager
    def noting_its_end(self) -> Iterator[None]:
        """Around a stage's work: where it is interrupted, its time until then is not lost."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk: what came after the last note is lost
                self.note_spent()
            raise

    def note_spent(self) -> None:
        """Write down what this stage has taken so far, for the attempt that goes on where this one is interrupted."""
        if self.is_main_process:
            write_json(self._spent_file, {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds})

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this stage so far: of its process from its start on, interrupted attempts included."""
        return self._spent_before + time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process and those that it started, interrupted attempts included."""
        return self._cpu_before + cpu_seconds()

    def count(self, **amounts: float) -> None:
        """Add to what this stage cost: ``flops``, ``tokens_generated``. `finish` writes the sums."""
        for name, amount in amounts.items():
            self._counted[name] = self._counted.get(name, 0) + amount

    def counted(self, name: str) -> float:
        """What was counted under a name so far."""
        return self._counted.get(name, 0)

    def finish(self, **figures: Any) -> None:
        """Write the model's card, where there is a model, and ``done.json`` with figures and cost. Call it last.

        The cost is apart from the figures, for it differs between equal runs: peak memory of the main process, what
        the stage counted, CPU seconds, and the wall-clock seconds of this attempt by part (`resources.PARTS`).
        """
        if self.is_main_process:
            times = {name: seconds - self._parts_before.get(name, 0.0) for name, seconds in seconds_by_part().items()}
            times["other"] = max(0.0, lived() - sum(times.values()))
            cost = {**peak_memory(), **self._counted, "cpu_seconds": round(self.cpu_seconds, 2)}
            cost["times"] = {name: round(seconds, 3) for name, seconds in times.items()}
            model = self.dir / "model"
            # A model that was brought along keeps its own card, where it lies.
            made = "given" not in figures
            if made and any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
                config = OmegaConf.to_container(self.run.config, resolve=True)
                write_card(model, self.stage, {**config, self.stage: self.config}, figures)
            self.run.finish(self.name, self.fingerprint, self.seconds, figures, cost)
            self._spent_file.unlink(missing_ok=True)


def parse_point(text: str) -> dict[str, Any]:
    """``"kl_coef=0.0,lam=1"`` -> ``{"kl_coef": 0.0, "lam": 1}``, values read as YAML."""
    return OmegaConf.to_container(OmegaConf.from_dotlist(text.split(",")))


def stage_main(
    stage: str,
    run_stage: Callable[[StageContext], None],
    argv: list[str] | None = None,
    choices: dict[str, Callable[[StageContext], None]] | None = None,
) -> None:
    """Run a stage from the command line: ``python -m <stage> RUN [--point key=value]``.

    Args:
        choices: a room with several steps offers them as ``--step``; then ``stage`` names the room only.

    Exit codes: 0 done, 2 the user can mend it, 130 interrupted (the same command goes on), 1 a defect.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m ppo_vs_dpo.{stage}", description=sys.modules[run_stage.__module__].__doc__
    )
    parser.add_argument("run", help="the run folder (holds config.yaml)")
    if choices:
        parser.add_argument("--step", choices=sorted(choices), required=True, help="which step of this room")
    else:
        parser.add_argument("--point", default="", help="a point of a sweep, e.g. kl_coef=0.0")
    parser.add_argument("--fingerprint", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    lose_no_interrupt()
    say_where_asked()
    code = 1
    try:
        with contextlib.ExitStack() as held:
            run = RunFolder(arguments.run)
            if choices:
                stage, run_stage, point = arguments.step, choices[arguments.step], {}
            else:
                point = parse_point(arguments.point) if arguments.point else {}
            context = StageContext(run, stage, point, arguments.fingerprint, time.monotonic() - lived())
            ended = begin(context, held)
            with context.noting_its_end():
                run_stage(context)
        code = 0
    except KeyboardInterrupt:
        warn(f"\nstage {stage} interrupted; the same command goes on from its last checkpoint.\n")
        code = 130
    except Exception as error:
        said = refusals.explain(error)
        if said is None:
            warn(traceback.format_exc())
        code = 1 if said is None else 2
        warn(f"\nerror in stage {stage}: {refusals.of_a_defect(error) if said is None else said}\n")
    finally:
        _leave_process_group(in_order=code == 0)
    if code:
        sys.exit(code)
    ended()


def begin(context: StageContext, held: contextlib.ExitStack) -> Callable[[], None]:
    """Make sure that this process works on its stage alone, that it ends with its launcher, and on what it works.

    ``context``: started by hand it has no fingerprint yet, and gets the one that the command would give; ``held``
    holds the locks.

    Returns:
        What to call when this process, and all others of the stage, have ended in order.

    Raises:
        UserError: another job is at work on this stage, or a command on this run.
    """
    run, rank, ranks = context.run, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    by_hand = context.fingerprint is None
    if "RANK" in os.environ or not by_hand:
        die_with_parent()  # not of a shell: `nohup python -m ...` may outlive it
    if by_hand and rank == 0:
        held.enter_context(locks.hold(locks.run_lock(run.root), str(run.root), shared=True))
    held.enter_context(locks.stage_at_work(run.root, context.name, rank, ranks))
    if by_hand and context.stage in NEEDS:
        digests = Digests(run.cache("digests.json"))
        made = fingerprint_of(run.config, context.stage, context.point, digests, ranks, run.begun)
        context.fingerprint = made.fingerprint
        run.refuse_other_rows(context.name, made)
        if rank == 0:
            digests.save()
            if context.point and context.point not in points_of(run.config, context.stage):
                warn(
                    f"{context.name}: {context.stage}.sweep has no such point. It is trained, and compare will not "
                    f"read it until the sweep has it.\n"
                )
            aside = run.begin(context.name, made)
            if aside is not None:
                warn(f"{context.name} was made with other settings; that result is kept in {aside}\n")
    Path(context.dir).mkdir(parents=True, exist_ok=True)
    if ranks > 1 and on_several_machines(run.config):
        return beat(Path(context.dir, PULSE), rank)
    return lambda: None


def on_several_machines(config: DictConfig) -> bool:
    """Whether a run's training stages have ranks on other machines, which nobody here sees."""
    launch = config.get("launch") or {}
    return bool(launch.get("hostfile")) or int(launch.get("nodes") or 1) > 1


def _leave_process_group(in_order: bool) -> None:
    """End a distributed run in order: without this, about one in eight two-rank runs aborts at exit."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if in_order:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
