"""The wheel, installed into an environment that knows nothing of the repository, beside somebody else's modules."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.pipeline import mini

ROOT = Path(__file__).parents[1]
# What others call their own files. Each would stop a program that imports it.
THEIRS = ("models.py", "compare.py", "configs/__init__.py", "ppo/__init__.py", "dpo.py", "tests/__init__.py", "sft.py")
# Every stage is started once, as a process; what it then works on is held elsewhere.
SMALLER = [
    "dpo.sweep=null", "ppo.sweep=null", "ppo.max_steps=2", "launch.workers=1", "name=small", "data.sft_examples=320",
    "data.pairs=96", "data.test_pairs=64", "sft.num_train_epochs=1", "compare.n_prompts=32", "compare.pool_size=2",
    "compare.best_of_n=[2]", "compare.best_of={}", "compare.checkpoints={}",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The tree as git has it: a build in the checkout would leave a folder there, and take in what is not committed.
    source = folder / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The program of a fresh environment, in which the dependencies are found and this repository is not."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # A path that another path file names is searched for packages only: an editable install's hook there stays asleep.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*install, "--force-reinstall", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


@pytest.mark.slow
def test_an_editor_finds_an_editable_install(tmp_path):
    """docs/install.md's line: the path file names a folder with the package and its py.typed, which is what pyright,
    mypy and jedi follow; they run no import hook."""
    (line,) = re.findall(r"^ {4}pip (install -e .*strict)$", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    source = tmp_path / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv" / "bin" / "python")]
    subprocess.run([*pip, "-q", *line.split()], check=True, capture_output=True, cwd=source)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (path_file,) = site.glob("__editable__*.pth")
    package = Path(path_file.read_text().strip()) / "ppo_vs_dpo"
    assert (package / "py.typed").is_file()
    for name in ("__init__.py", "ppo/trainer.py", "ppo/config/config.py"):
        assert (package / name).resolve() == source / name


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('somebody else imported me')\n")
    return tmp_path


def run(command: list[str], folder: Path, timeout: int = 600) -> str:
    environment = {k: v for k, v in mini.environment().items() if k != "PYTHONPATH"} | {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_one_name_at_the_top(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"ppo_vs_dpo"}
    files = zipfile.ZipFile(wheel).namelist()
    assert "ppo_vs_dpo/py.typed" in files
    assert not [name for name in files if name.startswith(("ppo_vs_dpo/tests", "ppo_vs_dpo/benchmarks"))]


def test_pipeline_and_python_from_a_folder_of_somebody_else(installed, elsewhere):
    """A whole miniature run by the command, then docs/ppo.md's Python example on its model."""
    run([str(installed / "ppo-vs-dpo"), *mini.SMALL, *SMALLER], elsewhere)
    assert (elsewhere / "runs" / "small" / "compare" / "report.html").is_file()
    where = run([str(installed / "python"), "-c", "import ppo_vs_dpo; print(ppo_vs_dpo.__file__)"], elsewhere)
    assert Path(where.strip()).is_relative_to(installed.parent)
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, flags=re.S).group(1)
    (elsewhere / "example.py").write_text(example.replace("runs/quickstart", "runs/small"))
    run([str(installed / "python"), "example.py"], elsewhere)
    assert (elsewhere / "likes_good" / "checkpoint-3").is_dir()
