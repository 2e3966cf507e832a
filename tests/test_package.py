"""The package as users get it: one import name, every folder listed, the public names."""

import ast
import importlib
import inspect
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import transformers

import ppo_vs_dpo
from ppo_vs_dpo.artifacts.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = (
    "artifacts",
    "models",
    "preferences",
    "sft",
    "reward_model",
    "ppo",
    "dpo",
    "compare",
    "papers",
    "pipeline",
    "configs",
)


def test_every_folder_with_code_is_installed():
    found = {"ppo_vs_dpo"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add("ppo_vs_dpo." + ".".join(init.parent.relative_to(ROOT).parts))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)
    code = {file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in code)


def test_ctrl_c_is_heard_from_the_first_line_on(monkeypatch, capsys):
    """While libraries load, and where one of them makes another error of it."""
    assert PROJECT["project"]["scripts"] == {"ppo-vs-dpo": "ppo_vs_dpo.__main__:main"}
    from ppo_vs_dpo import __main__ as begin
    from ppo_vs_dpo.pipeline import cli

    def swallowed(arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise UserError("'NoneType' object has no attribute '_invalidate_flags_cache'") from None

    class Typed:
        """Ctrl-C as the command's own module is looked for."""

        def find_spec(self, name, *_):
            if name == cli.__name__:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "dispatch", swallowed)
    monkeypatch.setattr(sys, "argv", ["ppo-vs-dpo", "list"])
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                begin.main()
            assert end.value.code == 130
            assert (
                capsys.readouterr().err.strip()
                == "interrupted; the same command goes on, a stage from its last checkpoint."
            )
            signal.signal(signal.SIGINT, signal.default_int_handler)
            monkeypatch.delitem(sys.modules, cli.__name__, raising=False)
            monkeypatch.setattr(sys, "meta_path", [Typed(), *sys.meta_path])
    finally:
        signal.signal(signal.SIGINT, before)


def test_public_names():
    """Each public name is there, is what its module has, and is declared for editors as it is loaded."""
    source = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name: node.module
        for block in source.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(declared) == sorted(ppo_vs_dpo.__all__)
    for name, module in declared.items():
        assert getattr(ppo_vs_dpo, name) is getattr(importlib.import_module(module), name)
        assert name in dir(ppo_vs_dpo)
    # What is not there is not there for an editor either: the module has no __getattr__ that a type checker sees.
    assert "__getattr__" not in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    with pytest.raises(AttributeError, match=r"no attribute 'PPOtrainer'; public names: .*PPOTrainer"):
        ppo_vs_dpo.PPOtrainer  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, ppo_vs_dpo; print(*[m for m in ('torch', 'transformers', 'numpy', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_room_holds_nine_things_at_most():
    """Folders of code, less ``__init__`` and ``__main__``; `compare/estimates/metrics` has one folder a metric."""
    crowded = {}
    for room in ROOMS[:-1]:
        for folder in [ROOT / room, *(f for f in (ROOT / room).rglob("*") if (f / "__init__.py").is_file())]:
            things = [
                thing.name
                for thing in folder.iterdir()
                if not thing.name.startswith(("__", ".")) and (thing.suffix == ".py" or thing.is_dir())
            ]
            if len(things) > 9:
                crowded[str(folder.relative_to(ROOT))] = sorted(things)
    assert not crowded


def test_a_module_has_four_hundred_lines_at_most():
    """One idea a module; ``benchmarks`` too."""
    files = [file for room in (*ROOMS[:-1], "benchmarks") for file in (ROOT / room).rglob("*.py")]
    long = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {str(file.relative_to(ROOT)): lines for file, lines in long.items() if lines > 400}


def example_of(name: str) -> str:
    """The lines under ``Example::`` in a public name's docstring, which stand before anything but its first words."""
    text = inspect.getdoc(getattr(ppo_vs_dpo, name))
    paragraphs = text.split("\n\n")
    assert paragraphs[1] == "Example::", f"help({name}) does not begin with an example"
    lines = []
    for line in text.partition("Example::\n\n")[2].splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


@pytest.mark.parametrize("name", ppo_vs_dpo.__all__)
def test_help_begins_with_lines_that_run(name, tmp_path, monkeypatch, tiny_llama, word_tokenizer):
    """Typed into a folder with a model, a reward model and a run."""
    monkeypatch.chdir(tmp_path)
    policy = tiny_llama(0)
    reward = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**policy.config.to_dict(), "num_labels": 1})
    )
    for folder, model in (("my_model", policy), ("my_reward_model", reward)):
        model.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    code = example_of(name)
    assert len(code.splitlines()) <= 14
    assert name in code
    exec(compile(code, name, "exec"), {})
