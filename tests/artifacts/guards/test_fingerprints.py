""" "Nothing changed" is true: whatever a section names counts, wherever in it it is named."""

import errno
import json
import os

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.guards import fingerprints as guard
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.versions import differences, made_by


def of(config):
    return {name: made.fingerprint for name, made in guard.fingerprints(OmegaConf.create(config)).items()}


def changed(config, change):
    before = of(config)
    change()
    after = of(config)
    return {name for name in before if before[name] != after[name]}


PLACES = {
    "a file of completions": lambda path: {"compare": {"policies": {"theirs": {"completions": path}}}},
    "a model among the policies": lambda path: {"compare": {"policies": {"theirs": {"path": path}}}},
    "a judge's model": lambda path: {"compare": {"judges": [{"kind": "reward_model", "path": path}]}},
    "a key nobody has thought of": lambda path: {"compare": {"a": [{"b": {"c": [path]}}]}},
}


@pytest.mark.parametrize("where", PLACES)
def test_a_named_file_or_folder_counts(tmp_path, where):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    for path in (folder, folder / "weights"):
        (folder / "weights").write_text("old")
        assert changed(PLACES[where](str(path)), lambda: (folder / "weights").write_text("new")) == {"compare"}


def test_a_disk_that_does_not_answer_makes_nothing_stale(tmp_path, monkeypatch):
    (tmp_path / "weights").write_text("old")

    def fails_with(number):
        def of(self, path):
            raise OSError(number, "no answer", str(path))

        monkeypatch.setattr(Digests, "of", of)
        return guard.content_of(str(tmp_path / "weights"), "ppo.path", Digests(None))

    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):
        with pytest.raises(OSError, match="no answer"):
            fails_with(number)
    assert fails_with(errno.EACCES) is None


def test_a_changed_input_of_the_first_stage_reaches_all(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("one")
    config = {"data": {"source": "pairs", "path": str(file)}, "dpo": {"beta": 0.1}}
    assert changed(config, lambda: file.write_text("two")) == set(guard.NEEDS)


def test_names_are_no_folders_that_happen_to_lie_where_one_types(tmp_path, monkeypatch):
    """`reward_model`, `tensorboard`, `transformers`: in a clone, or where a tracker writes, such a folder changes."""
    from ppo_vs_dpo.pipeline.composing.compose import load
    from ppo_vs_dpo.pipeline.composing.words import experiments

    monkeypatch.chdir(tmp_path)
    for experiment in experiments():
        config = OmegaConf.to_container(
            load([f"experiment={experiment}", "model.path=x"], check_missing=False), resolve=True
        )
        words = {text for key, text in guard.leaves(config, "") if guard.BARE.match(text) and text != "x"}
        assert len(words) > 10

        def make(words=words, experiment=experiment):
            for word in words:
                (tmp_path / word).mkdir(exist_ok=True)
                (tmp_path / word / "file").write_text(experiment)

        assert changed(config, make) == set(), experiment
    (tmp_path / "pairs").mkdir(exist_ok=True)
    config = {"data": {"source": "files", "path": "pairs"}}
    assert changed(config, lambda: (tmp_path / "pairs" / "a.jsonl").write_text("x")) == set(guard.NEEDS)


def test_an_adapter_s_base_counts(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "weights").write_text("old")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    config = {"dpo": {"reference_path": str(adapter)}}
    assert changed(config, lambda: (base / "weights").write_text("new")) == {"dpo", "compare"}


@pytest.mark.parametrize("by", ["name", "file"])
def test_the_source_of_a_function_and_of_what_it_imports_counts(tmp_path, monkeypatch, by):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text("import json, torch\nfrom my_words import NICE\ndef f(p, c): return []\n")
    (tmp_path / "my_words.py").write_text("from my_deep import *\nNICE = 1\n")
    (tmp_path / "my_deep.py").write_text("X = 1\n")
    name = "my_rewards:f" if by == "name" else f"{tmp_path / 'my_rewards.py'}:f"
    config = {"compare": {"judges": [{"kind": "function", "function": name}]}}
    for module in ("my_rewards", "my_words", "my_deep"):
        file = tmp_path / f"{module}.py"
        assert changed(config, lambda file=file: file.write_text(file.read_text() + "# more\n")) == {"compare"}
    assert changed(config, lambda: (tmp_path / "another.py").write_text("x")) == set()


def test_our_own_templates_and_constitutions_count(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "mine.yaml").write_text("a: 1\n")
    monkeypatch.setattr(guard, "CONFIGS", tmp_path)
    config = {"compare": {"judges": [{"kind": "llm", "template": "mine"}]}}
    assert changed(config, lambda: (tmp_path / "judge" / "mine.yaml").write_text("a: 2\n")) == {"compare"}


def test_names_that_are_no_paths_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").write_text("a file that happens to have this name")
    config = {"data": {"source": "pairs"}, "compare": {"judges": [{"base_url": "http://localhost:1/v1"}]}}
    assert changed(config, lambda: (tmp_path / "pairs").write_text("changed")) == set()
    long = {"compare": {"text": "x" * 5000, "lines": "a\nb", "odd": "\0", "bad": "nowhere.at:all"}}
    assert of(long) == of(long)


def test_hashes_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    file, memory = tmp_path / "weights", tmp_path / "digests.json"
    file.write_text("old")
    first = Digests(memory)
    old = first.of(file)
    first.save()
    read = []
    monkeypatch.setattr(
        "ppo_vs_dpo.artifacts.guards.digests.fingerprint_file", lambda path: read.append(path) or "new"
    )
    assert Digests(memory).of(file) == old
    assert read == []
    os.utime(file, ns=(1, 1))
    assert Digests(memory).of(file) == "new"
    for spoilt in (b"[]", b"\xff", b'{"%s": 3}' % str(file).encode()):
        memory.write_bytes(spoilt)
        assert Digests(memory).of(file) == "new"


def test_a_point_that_is_not_in_the_sweep_has_a_fingerprint():
    config = OmegaConf.create({"ppo": {"kl_coef": 0.1, "sweep": {"kl_coef": [0.0]}}})
    known = guard.fingerprints(config)
    assert guard.fingerprint_of(config, "ppo", {"kl_coef": 0.0}) == known["ppo,kl_coef=0.0"]
    other = guard.fingerprint_of(config, "ppo", {"kl_coef": 0.7})[0]
    assert other not in {made.fingerprint for made in known.values()}


def test_versions_differ_by_source_and_by_decisive_libraries():
    here = made_by()
    assert differences(here, here) == []
    assert "torch 1.0 there" in differences({**here, "torch": "1.0"}, here)[0]
    assert "source other" in differences({**here, "source": "other"}, here)[0]
    assert differences({**here, "commit": "another, and the same code"}, here) == []


OWN = {
    "rewards/__init__.py": "from rewards.words import *\n",
    "rewards/words.py": "GOOD = {'good'}\n",
    "rewards/count.py": (
        "import importlib\nfrom pathlib import Path\nfrom . import deep\n"
        "late = importlib.import_module('late_module')\n"
        "BAD = Path(__file__).with_name('bad.txt').read_text().split()\n"
        "def f(prompts, completions, **columns):\n"
        "    open('log.txt', 'a').write('x')\n    return [0.0 for c in completions]\n"
    ),
    "rewards/deep/__init__.py": "x = 1\n",
    "rewards/bad.txt": "bad dull\n",
    "late_module.py": "y = 1\n",
    "log.txt": "what it wrote\n",
}


@pytest.mark.parametrize("name", OWN)
def test_packages_late_imports_and_files_that_are_read_count(tmp_path, monkeypatch, name):
    """What a function writes does not: its own log would make the run stale for ever."""
    for file, text in OWN.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OmegaConf.create({"seed": 1, "ppo": {"reward": "rewards.count:f"}})
    before = guard.fingerprints(config)["ppo"][0]
    (tmp_path / name).write_text(OWN[name] + "\n# changed\n")
    assert (guard.fingerprints(config)["ppo"][0] != before) == (name != "log.txt")
