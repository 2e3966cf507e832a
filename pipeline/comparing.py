"""``ppo-vs-dpo compare --policy NAME=SOURCE ...``: a verdict on models or outputs that somebody else made.

Nothing is trained. All that can be wrong with files is said in the first second, before a model is loaded.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import Complaint, UserError, first_sentence, in_help, say
from ppo_vs_dpo.artifacts.files import fingerprint_file, sha256_of, write_json, write_parquet, write_text
from ppo_vs_dpo.artifacts.resources import lived
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.sampling.rows import fitting, match, read_completions
from ppo_vs_dpo.pipeline.composing.compose import check_section, compose_plainly
from ppo_vs_dpo.pipeline.composing.words import no_such_choice
from ppo_vs_dpo.pipeline.planning.cost.beforehand import requests, say_cost
from ppo_vs_dpo.pipeline.planning.cost.work import work_of
from ppo_vs_dpo.pipeline.running.job import environment
from ppo_vs_dpo.preferences.reading.prompts import read_prompts
from ppo_vs_dpo.preferences.reading.readers import SUFFIXES, suffix_of
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.schema import Text, prompt_id

# The place of the policy that all are held against; a run's is its SFT model, and files of a run call it so.
REFERENCE = "sft"
OWN = ("--policy", "--prompts", "--judge", "--reference")
# One draw of the reference for the baseline, one for the control (reference against itself); nothing to select from.
DEFAULTS = {"baseline_draws": 1, "pool_size": 1, "best_of_n": [], "best_of": {}, "checkpoints": {}}
DEFAULTS |= {"max_new_tokens": 256, "n_prompts": 512, "enumerate_up_to": 0, "batch_size": 64}
USAGE = """\
ppo-vs-dpo compare --prompts FILE --policy a=FOLDER --policy b=outputs.jsonl --reference FOLDER --judge JUDGE
       ppo-vs-dpo compare RUN [RUN ...] [--output FOLDER]        (pools finished runs)"""


def wanted(arguments: list[str]) -> bool:
    """Whether a command line of ``compare`` names policies rather than runs."""
    return (
        not arguments
        or any(word.split("=")[0] in OWN for word in arguments)
        or {"--help", "-h"} & {*arguments} != set()
    )


def main(arguments: list[str]) -> int:
    """The command."""
    given = parser().parse_intermixed_args(arguments)
    sources, judges, prompts, note = understood(given)
    if note:
        say(note + "\n")
    run = lay_out(folder_of(given, sources), given, sources, judges, prompts)
    say(f"{cost_of(run)}  loading libraries\n")
    sys.stdout.flush()

    context = Told(run, "compare", began=time.monotonic() - lived())
    Path(context.dir).mkdir(parents=True, exist_ok=True)
    with (Path(context.dir) / "log.txt").open("a", encoding="utf-8") as log:
        # What libraries print goes where a stage's output goes.
        with contextlib.redirect_stderr(log):
            with contextlib.redirect_stdout(log):
                from ppo_vs_dpo.compare.stage import run_compare
                from ppo_vs_dpo.pipeline.running.command import say_verdict
            run_compare(context)
        say_verdict(run)
    return 0


def understood(given: argparse.Namespace) -> tuple[list[tuple[str, str]], list[dict[str, Any]], list[Text], str]:
    """Policies, judges and prompts as they were meant, and what was done to the prompts.

    Raises:
        UserError: all that is wrong with them, at once.
    """
    wrong: list[str] = []
    found = gathered(given, wrong)
    if wrong:
        raise UserError(wrong[0] if len(wrong) == 1 else "\n  ".join(["the command has errors:", *wrong]))
    return found


@contextlib.contextmanager
def noted(wrong: list[str]) -> Iterator[None]:
    """Around a look at one thing: what is wrong with it is said with the rest."""
    try:
        yield
    except Complaint as error:
        wrong += error.problems
    except UserError as error:
        wrong.append(str(error))


def gathered(
    given: argparse.Namespace, wrong: list[str]
) -> tuple[list[tuple[str, str]], list[dict[str, Any]], list[Text], str]:
    """`understood`, as far as it could be; a sentence in ``wrong`` for all that could not."""
    sources, judges, prompts, note, settings = [], [], [], "", None
    for text in given.policy or []:
        with noted(wrong):
            sources.append(source_of(text))
    if len(given.policy or []) < 2 and not (given.policy and given.reference):
        wrong.append(
            "what is compared with what? Give two of --policy NAME=SOURCE, or one and --reference MODEL; or finished "
            "runs to pool: ppo-vs-dpo compare RUN RUN ..."
        )
    names = [name for name, _ in sources]
    wrong += [
        f"--policy {name}: the name stands there twice." for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if given.reference is not None:
        with noted(wrong):
            check_model(given.reference, "--reference")
    with noted(wrong):
        reference_of(given, sources)
    for text in given.judge or []:
        with noted(wrong):
            judges.append(judge_of(text))
    if not given.judge:
        wrong.append(
            "who judges? Give --judge my_file.py:function, --judge reward_model=MODEL, or --judge "
            "'llm={model: NAME, base_url: URL, template: alpaca_eval}' (docs/compare.md)."
        )
    with noted(wrong):
        settings = settings_of(given.settings)
    with noted(wrong):
        check_folder(folder_of(given, sources))
    # Prompts may be those of a policy's file: without it nothing is known of them.
    if given.prompts is not None or len(sources) == len(given.policy or []):
        with noted(wrong):
            prompts = prompts_of(given.prompts, sources)
    if prompts and settings is not None:
        prompts = prompts[: int(settings["compare"]["n_prompts"])]
        models = [path for _, path in sources if not is_outputs(path)] + [given.reference or ""]
        with noted(wrong):
            prompts, note = fitting(prompts, models)
        ids = [prompt_id(prompt) for prompt in prompts]
        for name, path in sources:
            if is_outputs(path):
                with noted(wrong):
                    match(path, prompts, ids, 1, f"--policy {name}={path}")
    return sources, judges, prompts, note


def folder_of(given: argparse.Namespace, sources: list[tuple[str, str]]) -> Path:
    """Where the comparison is written."""
    return Path(given.output or f"runs/{'-against-'.join(name for name, _ in sources)[:80]}")


def check_folder(folder: Path) -> None:
    """Refuse the folder of a run in which something was trained."""
    if (folder / "config.yaml").is_file() and OmegaConf.load(folder / "config.yaml").get("given") is None:
        raise UserError(f"{folder} holds a run. Choose another folder: --output FOLDER.")


def reference_of(given: argparse.Namespace, sources: list[tuple[str, str]]) -> tuple[str, str, dict[str, str]]:
    """What the others are held against, the name it is shown by, and the others.

    Without ``--reference`` the first model, or the first file where there is no model.

    Raises:
        UserError: a policy's name is one that reports have for something else.
    """
    reference, rest, shown = given.reference, dict(sources), "reference"
    if reference is None and sources:
        shown = next((name for name, path in sources if not is_outputs(path)), sources[0][0])
        reference = rest.pop(shown)
    taken = {name for name in rest if name == REFERENCE or name.startswith("best_of_")}
    if taken:
        raise UserError(f"--policy {min(taken)}: this name has a meaning in reports. Choose another.")
    return reference, shown, rest


def cost_of(run: RunFolder) -> str:
    """What is drawn, read and asked, and how long that takes here, as models of the reference's size would."""
    work = work_of(run, "compare")
    if not work.responses:  # files alone
        return requests([work])
    kept = run.cache("completions")
    again = "what was drawn or answered before is used again, and costs nothing\n" if kept.is_dir() else ""
    return say_cost(run, ["compare"], environment(run.config, "measured"))[0] + again


def parser() -> argparse.ArgumentParser:
    """What may be typed."""
    found = argparse.ArgumentParser(
        prog="ppo-vs-dpo compare", usage=USAGE, description=in_help(__doc__.split("\n\n")[0])
    )
    found.add_argument("--policy", action="append", metavar="NAME=SOURCE", help="a model (folder or Hub), or outputs")
    found.add_argument("--prompts", metavar="FILE", help="default: those of the first file of outputs")
    found.add_argument("--reference", metavar="MODEL", help="what the policies were trained from: KL is to it")
    found.add_argument("--judge", action="append", metavar="JUDGE", help="FILE.py:FUNCTION, reward_model=, llm=")
    found.add_argument("--output", metavar="FOLDER", help="where to write (default: runs/NAME-against-NAME)")
    found.add_argument("--seed", type=int, default=1, help="of all draws (default: %(default)s)")
    found.add_argument("settings", nargs="*", metavar="key=value", help="compare.max_new_tokens=128 model.dtype=...")
    return found


class Told(StageContext):
    """Says what is being done, a line for each thing."""

    _said: frozenset[str] | set[str] = frozenset()

    def progress(self, done: float, total: float, note: str = "") -> None:
        super().progress(done, total, note)
        what = note.replace(f" {REFERENCE}", f" {self.run.config.given.shown}")
        if note and note not in self._said:
            self._said = {*self._said, note}
            say(f"  {what}\n")
            sys.stdout.flush()


def source_of(text: str) -> tuple[str, str]:
    """``"a=FOLDER"`` -> ``("a", "FOLDER")``.

    Raises:
        UserError: no name, or a source that is not there.
    """
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise UserError(f"--policy {text}: give a name and where it is, NAME=FOLDER or NAME=outputs.jsonl.")
    if is_outputs(path) and not Path(path).is_file():
        raise UserError(f"--policy {name}: {path} does not exist.")
    if not is_outputs(path):
        check_model(path, f"--policy {name}")
    return name, path


def is_outputs(path: str) -> bool:
    """A file of completions, by its name; all else is a model."""
    return suffix_of(Path(path)) in SUFFIXES


def check_model(path: str, where: str) -> None:
    """Refuse a folder that holds no model, or a path that is none; a name of the Hub is looked for when it loads."""
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"{where}: {path} does not exist. Give a model's folder, its name on the Hub, or a file.")
    if folder.exists() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = folder / "model"
        hint = f" Did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise UserError(f"{where}: {path} holds no model: it has no config.json.{hint}")


def check_scores(path: str) -> None:
    """Refuse a folder whose model has no head to score with; one of the Hub is looked at when it loads."""
    if Path(path).is_dir():
        from ppo_vs_dpo.artifacts.resources import libraries

        with libraries():
            from ppo_vs_dpo.models.loading.heads import check_reward
        check_reward(path)


def judge_of(text: str) -> dict[str, Any]:
    """``--judge`` as an entry of ``compare.judges``.

    Raises:
        UserError: none of the kinds, or a function or folder that is not there.
    """
    kind, sign, rest = text.partition("=")
    if sign and kind == "llm":
        value = OmegaConf.to_container(OmegaConf.create(rest)) if rest.startswith("{") else {"model": rest}
        return {"kind": "llm", **value}
    if sign and kind == "reward_model":
        check_model(rest, "--judge reward_model")
        check_scores(rest)
        return {"kind": "reward_model", "name": Path(rest).name, "path": rest}
    if sign and kind != "function":
        raise UserError(no_such_choice(f"--judge/{kind}", ["function", "reward_model", "llm"]))
    function = rest if sign else text
    if ":" not in function:
        raise UserError(f"--judge {text}: give FILE.py:FUNCTION, reward_model=MODEL or llm=MODEL.")
    load_gold(function, "--judge")
    return {"kind": "function", "name": function.rpartition(":")[2], "function": function}


def prompts_of(path: str | None, sources: list[tuple[str, str]]) -> list[Text]:
    """The prompts: of their own file, or those of the first file of outputs.

    Raises:
        UserError: neither is there, or the file cannot be read.
    """
    if path is not None:
        found = list(read_prompts(path, conversational=None))
        if not found:
            raise UserError(f"--prompts {path}: the file holds no prompt.")
        return found
    outputs = [(name, source) for name, source in sources if is_outputs(source)]
    if not outputs:
        raise UserError("on which prompts? Give --prompts FILE: a column prompt, texts or lists of messages.")
    name, source = outputs[0]
    rows = read_completions(source, f"--policy {name}={source}")
    if any(prompt is None for prompt, *_ in rows):
        raise UserError(f"--policy {name}={source}: rows have prompt_id only; give --prompts FILE as well.")
    return list({prompt_id(prompt): prompt for prompt, *_ in rows}.values())


def settings_of(overrides: list[str]) -> dict[str, Any]:
    """The sections ``model`` and ``compare``, with what was typed.

    Raises:
        UserError: a key of another section, an unknown key or a value that cannot be meant.
    """
    keys = [one.lstrip("+").partition("=")[0] for one in overrides]
    if foreign := [key for key in keys if key.split(".")[0] not in ("model", "compare", "launch", "deepspeed")]:
        raise UserError(f"{foreign[0]}: only compare.KEY=VALUE and model.KEY=VALUE mean something here.")
    config = compose_plainly(overrides)
    for key, value in DEFAULTS.items():
        if f"compare.{key}" not in keys:
            OmegaConf.update(config, f"compare.{key}", value, merge=False)
    if problems := check_section("compare", config.compare, "ppo_vs_dpo.compare.config:CompareStage"):
        raise Complaint(problems)
    return OmegaConf.to_container(config, resolve=True)


def lay_out(
    folder: Path, given: Any, sources: list[tuple[str, str]], judges: list[dict[str, Any]], prompts: list[Text]
) -> RunFolder:
    """Write the folder that `compare.stage` reads: a run in which nothing was trained."""
    reference, shown, rest = reference_of(given, sources)
    config = settings_of(given.settings)
    policies = {name: {"completions" if is_outputs(path) else "path": path} for name, path in rest.items()}
    config["compare"] |= {"policies": policies, "judges": [*config["compare"]["judges"], *judges]}
    figures = link(folder / REFERENCE, reference)
    model = {**config["model"], "path": None if is_outputs(reference) else reference, "architecture": {}}
    plain = {
        "experiment": "compare",
        "name": folder.name,
        "output_dir": str(folder.parent),
        "seed": given.seed,
        "stages": ["compare"],
        "given": {"prompts": given.prompts, "reference": reference, "shown": shown, "policies": dict(sources)},
        "model": model,
        "data": {},
        "compare": config["compare"],
        "deepspeed": config.get("deepspeed") or {},
        "launch": config["launch"],
    }
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    rows = {"prompt": prompts, "prompt_id": [prompt_id(prompt) for prompt in prompts]}
    write_parquet(folder / "data" / "prompts_heldout.parquet", rows)
    # Whatever the reference's draws depend on is in this fingerprint: they are used again where it is the same.
    write_json(
        folder / REFERENCE / "done.json",
        {"stage": REFERENCE, "fingerprint": stamp(reference), "finished": None, "seconds": 0, "figures": figures},
    )
    return RunFolder(folder)


def link(folder: Path, source: str) -> dict[str, str]:
    """Make ``folder/model`` the reference's model by a link, or name its file of outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    model.unlink(missing_ok=True)
    if is_outputs(source):
        return {"given": source, "completions": str(Path(source).resolve())}
    path = Path(source)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = Path(snapshot_download(source))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(f"--reference {source}: {first_sentence(error)}") from error
    model.symlink_to(path.resolve(), target_is_directory=True)
    return {"given": source}


def stamp(source: str) -> str:
    """Content of a file; names, sizes and times of a model's files (gigabytes are not read to see a change)."""
    path = Path(source)
    if path.is_file():
        return fingerprint_file(path)
    files = sorted(path.glob("*")) if path.is_dir() else []
    return sha256_of([source, *([one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files)])
