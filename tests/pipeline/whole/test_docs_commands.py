"""Every command of README and the pages in docs/ is run: typed as it stands, with what makes it small behind it.

`SMALLER` says what that is: the commands share few runs, of a minute each. What is not there is still tried, and that
is fast: a run by what ``ppo-vs-dpo check`` does, which looks at all that its stages would refuse; a benchmark by its
``--help``; a target of make by ``make -n``. `ELSEWHERE` names the test that runs a command, and `NOT_HERE` says why
none can. A command of a new kind is in no table, and `test_every_command_has_its_place_and_every_place_its_command`
fails.
"""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.pipeline.checking.inputs import problems
from ppo_vs_dpo.pipeline.cli import COMMANDS, dispatch
from ppo_vs_dpo.pipeline.composing.schema import CONFIGS, SECTIONS, section_keys
from ppo_vs_dpo.pipeline.composing.words import experiments
from tests.pipeline import mini
from tests.pipeline.whole.test_readme import FEW, ROOT, commands, make_desk, typed
from tests.pipeline.whole.test_readme import PAGES as IN_DOCS

# The README's blocks are the affair of test_readme; what its sentences name is tried here, and so is CONTRIBUTING.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *IN_DOCS]
# A setting of the environment may stand before a command.
BEGINS = re.compile(
    r"([A-Z_]+=\S+ )?(ppo-vs-dpo \S|python (-m \S|benchmarks/)|(make|torchrun|sbatch|tensorboard|vllm serve|pip) \S)"
)
OWN = ["data=files", "data.path=my_pairs.jsonl", "data.conversational=true"]
SMALL = [
    *mini.SMALL[1:], "dpo.sweep=null", "data.sft_examples=320", "sft.num_train_epochs=1", "data.pairs=128",
    "reward_model.num_train_epochs=1", "ppo.max_steps=2", "compare.n_prompts=32", "compare.checkpoints={ppo: [2]}",
]  # fmt: skip
# Made pairs: few, from a policy that has hardly learned.
MADE = ["data.train_prompts=32", "data.test_prompts=8", "data.sft_examples=320", "sft.max_steps=4"]
BEGINNING = "stages=[data,sft,pairs]"

# Command -> what is typed behind it. Where a command stands before another here, it is typed before it.
SMALLER: dict[str, list[str]] = {
    "ppo-vs-dpo quickstart": SMALL,
    "ppo-vs-dpo quickstart launch.processes=auto launch.workers=1": SMALL,
    "ppo-vs-dpo quickstart stages=[ppo,compare]": SMALL,
    "ppo-vs-dpo quickstart compare.best_of={}": SMALL,
    "python -m ppo_vs_dpo.pipeline.planning.cost runs/quickstart": [],
    "python -m ppo_vs_dpo.compare runs/quickstart": [],
    "python -m ppo_vs_dpo.reward_model runs/quickstart": [],
    "python -m ppo_vs_dpo.ppo runs/quickstart --point kl_coef=0.0": [],
    "python -m ppo_vs_dpo.sft runs/quickstart": [],
    "python -m ppo_vs_dpo.dpo runs/quickstart": [],
    "python -m ppo_vs_dpo.ppo runs/quickstart": [],
    "ppo-vs-dpo verify runs/quickstart": [],
    "ppo-vs-dpo quickstart ppo.kl_coef=0.1 dpo.beta=0.5": SMALL,
    "ppo-vs-dpo clean runs/quickstart": [],
    "ppo-vs-dpo clean runs/quickstart --remove checkpoints,replaced": [],
    "ppo-vs-dpo quickstart seed=3": [*SMALL, "stages=[data]"],
    "ppo-vs-dpo quickstart name=world 'stages=[data]'": SMALL,
    "ppo-vs-dpo quickstart name=rloo ppo.advantage=rloo ppo.samples_per_prompt=4 ppo.sweep=null": [
        *SMALL, "ppo.sweep=null", "stages=[data,sft,pairs,reward_model,ppo]", "data.pairs=64", "sft.max_steps=2",
        "reward_model.max_steps=2", "reward_model.samples=16", "ppo.max_steps=1",
    ],
    "ppo-vs-dpo --config-dir my_configs experiment=mine": [*SMALL, "stages=[data]"],
    "ppo-vs-dpo constitution": [*MADE, "data.train_prompts=64", BEGINNING],
    "ppo-vs-dpo rejection": [*MADE, BEGINNING],
    "ppo-vs-dpo rejection name=rso data.rule=rso data.rso_beta=0.5 data.samples=16": [*MADE, BEGINNING],
    "ppo-vs-dpo constitution_chat name=cai model.path=my_model data.prompts_path=prompts.jsonl "
    "data.conversational=true": [
        "data.train_prompts=8", "data.test_prompts=4", "data.heldout_prompts=2", "data.max_new_tokens=8", BEGINNING,
    ],
    "ppo-vs-dpo constitution_chat name=cai model.path=smollm2 *": [
        "name=run", "data.train_prompts=8", "data.test_prompts=4", "data.heldout_prompts=2", "data.max_new_tokens=8",
        BEGINNING,
    ],
    "ppo-vs-dpo hh model.path=my_model ppo.reward=my_reward.py:polite": [*FEW, *OWN],
    "ppo-vs-dpo hh model.path=my_model 'ppo.reward=[reward_model, my_reward.py:polite]' "
    "'ppo.reward_weights=[1.0, 0.5]'": [*FEW, *OWN, "stages=[ppo]"],
    # Of the real run, what is large stays small here; the model is a tiny one under its name.
    "ppo-vs-dpo hh model.path=smollm2 *": [
        "name=real", "reward_model.max_steps=1", "dpo.max_steps=1", "ppo.max_steps=1", "compare.max_new_tokens=8",
    ],
    "ppo-vs-dpo hh model.path=my_model reward_model.path=runs/hh/reward_model/model": [
        *FEW, *OWN, "name=given", "stages=[data,sft,pairs,reward_model,ppo]",
    ],
    "ppo-vs-dpo list": [],
    "ppo-vs-dpo doctor": [],
    "tensorboard --logdir runs": ["--inspect"],
    "ppo-vs-dpo plan --table docs/scaling.md": [],
    "python -m ppo_vs_dpo.pipeline.composing.settings_page docs/settings.md": [],
}  # fmt: skip

# Command, or how it begins -> the test that runs it.
ELSEWHERE = {
    "ppo-vs-dpo data inspect*": "preferences/test_docs_data.py",
    "ppo-vs-dpo llama3_dpo*": "preferences/test_docs_data.py",
    "ppo-vs-dpo rejection name=imdb*": "preferences/test_docs_data.py",
    "ppo-vs-dpo iterate*": "preferences/recipes/test_recipes.py",
    "ppo-vs-dpo compare --prompts*": "pipeline/whole/test_comparing.py",
    "ppo-vs-dpo compare runs/*": "pipeline/whole/test_readme.py",
    "ppo-vs-dpo try model.path=my_model data.path=my_pairs.jsonl*": "pipeline/whole/test_readme.py",
    "ppo-vs-dpo -m quickstart seed=1,2,3*": "pipeline/whole/test_readme.py",
    "ppo-vs-dpo -m quickstart seed=1,2,3 hydra/launcher*": "pipeline/running/test_launch.py",
    "ppo-vs-dpo quickstart deepspeed=zero3 launch.hostfile*": "pipeline/running/test_launch.py",
    "ppo-vs-dpo quickstart launch.processes=8*": "pipeline/running/test_launch.py",
    "ppo-vs-dpo quickstart ppo.push_to_hub*": "pipeline/running/test_publish.py",
    "ppo-vs-dpo paper run*": "papers/test_miniature.py",
    "torchrun*": "pipeline/running/test_launch.py",
    "sbatch*": "pipeline/running/test_launch.py",
    "python -m ppo_vs_dpo.reward_model.bench*": "reward_model/test_bench.py",
    "python -m ppo_vs_dpo.compare.estimates.annotations*": "compare/estimates/test_annotations.py",
    "pip wheel*": "test_wheel.py",
    "pip install .*": "test_wheel.py",
    "pip install -e . --no-deps *": "test_wheel.py",
}
# Begin lines of shell blocks that are no command of ours: each is run where the desk is made.
BESIDE = ("zcat ../shared/data/hh_rlhf/harmless_base.jsonl.gz | python -c",)
# How a command begins -> why no test can run it on a machine without a GPU, a network or vLLM.
NOT_HERE = {
    "pip install*": "a package registry",
    "vllm serve*": "vLLM; that the folder loads with from_pretrained is what other tests hold",
    "python -m ppo_vs_dpo.models.sampling.vllm.server*": "vLLM: tests/ppo/rollouts/test_engine_vllm.py where it is",
    "ppo-vs-dpo hh ppo.generation_engine=vllm*": "vLLM: tests/ppo/rollouts/test_engine_vllm.py where it is",
    "torchrun --standalone --nproc-per-node 8*": "eight GPUs",
}
STANDS_FOR = [
    (r"paper show NAME", "paper show nplus2024"), (r"OpenAssistant/\S+", "runs/hh/reward_model/model"),
    (r"\b(RUN|runs/NAME)\b", "runs/quickstart"), (r"\b(MODEL|NAME_OR_FOLDER)\b", "my_model"),
    (r"\bNAME\b", "quickstart"), (r"=M\b", "=my_model"), (r"=F\b", "=my_pairs.jsonl"),
]  # fmt: skip


def commands_of(text: str) -> list[str]:
    """Commands in a page's blocks and between its backquotes, spelled out.

    Continued lines are joined, comments and what is optional are taken off, and what stands for a name has one.
    """
    whole = re.sub(r"\s*\\\n\s*", " ", text)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", whole, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)$", whole, re.MULTILINE)
    sentences = re.sub(r"```.*?```", "", whole, flags=re.DOTALL)
    lines += [re.sub(r"\s+", " ", one) for one in re.findall(r"`([^`]+)`", sentences)]
    plain = [re.split(r"\s{3,}|\s+#", re.sub(r"\s\[--[^]]*\]", "", line).strip())[0] for line in lines]
    plain = [re.sub(r"^(ppo-vs-dpo (?:-m |show |plan |check )?)experiment=", r"\1", line) for line in plain]
    for pattern, name in STANDS_FOR:
        plain = [re.sub(pattern, name, line) for line in plain]
    plain = [re.sub(r"^[A-Z_]+=\S+ ", "", line) if BEGINS.match(line) else line for line in plain]
    return [line for line in dict.fromkeys(plain) if BEGINS.match(line) and "..." not in line]


def in_shell(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, without comments; a quoted program is one line."""
    blocks = re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", text, flags=re.DOTALL)
    whole = (re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), block) for block in blocks)
    lines = [
        re.sub(r"(^|\s)#.*", "", line).strip() for b in whole for line in re.sub(r"\s*\\\n\s*", " ", b).splitlines()
    ]
    return [line for line in lines if line]


def place(line: str, table: dict) -> str | None:
    """The table's key for a command: the line itself, or the longest beginning of it that ends with a star."""
    begun = [key for key in table if key.endswith("*") and line.startswith(key.rstrip("*"))]
    return line if line in table else max(begun, key=len, default=None)


def is_mention(line: str) -> bool:
    """A command's bare word in a sentence, or a form of it."""
    words = line.split()
    return len(words) == 2 and words[0] == "ppo-vs-dpo" and words[1] in COMMANDS and line not in SMALLER


def commands_on(page) -> list[str]:
    """A page's commands; of the README those that `test_readme` does not run."""
    found = commands_of(page.read_text(encoding="utf-8"))
    return [line for line in found if line not in commands()] if page.stem == "README" else found


ALL = {line: page.stem for page in PAGES for line in commands_on(page)}


def test_every_command_has_its_place_and_every_place_its_command():
    assert len(ALL) > 60
    for table in (SMALLER, ELSEWHERE, NOT_HERE):
        used = {place(line, table) for line in ALL}
        assert not [key for key in table if key not in used], "no page has these commands any more"
    for name in {*ELSEWHERE.values()}:
        assert (ROOT / "tests" / name).is_file(), name
    unknown = [line for line in ALL if not (is_mention(line) or in_a_table(line) or how_it_is_tried(line))]
    assert not unknown, "say in this file how they are run, or why not"
    for page in PAGES:
        for line in in_shell(page.read_text(encoding="utf-8")):
            assert BEGINS.match(line) or line.startswith(BESIDE), f"{page.name}: {line}: no test runs it"


def test_a_command_that_no_test_runs_is_found():
    sentence = "See `python benchmarks/x.py MODEL`, or `A_B=1 make audit`."
    assert commands_of(sentence) == ["python benchmarks/x.py my_model", "make audit"]
    page = "```sh\ncurl http://x | sh\nppo-vs-dpo quickstart \\\n  seed=3   # another\nzap 'a\nb' c\n```\n"
    assert in_shell(page) == ["curl http://x | sh", "ppo-vs-dpo quickstart seed=3", "zap 'a b' c"]
    assert how_it_is_tried("torchrun --nproc-per-node 2 my_script.py") is None
    assert how_it_is_tried("ppo-vs-dpo frobnicate runs/quickstart") is None
    assert how_it_is_tried("ppo-vs-dpo paper list") == "asked"
    assert how_it_is_tried("ppo-vs-dpo -m quickstart seed=1,2,3") == "looked at"
    assert how_it_is_tried("python -m benchmarks.nothing") is None


# A key of a section, not a module (compare.frontier.exact) nor a file (ppo.py).
SETTING = re.compile(rf"(?<![\w./-])({'|'.join([*SECTIONS, 'launch'])})\.(?!py\b)([a-z_0-9]+)(?!\w*\.\w|\w)")


def settings_of(text: str) -> set[tuple[str, str]]:
    """Section and key of every setting in a page's blocks and backquotes."""
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    places = re.findall(r"```(?:sh|yaml)\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`]+)`", sentences)
    places += re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    return {found for place in places for found in SETTING.findall(place)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_setting_that_a_page_names_exists(page):
    known = {section: section_keys(section) for section in SECTIONS}
    known["launch"] = OmegaConf.load(CONFIGS / "config.yaml").launch
    for section, key in settings_of(page.read_text(encoding="utf-8")):
        assert key in known[section], f"{page.name}: {section}.{key}"


def test_a_setting_that_is_not_there_is_found():
    page = "See `ppo.kl_coeff=1` and `compare.frontier.exact`, `ppo.py`.\n\n    ppo-vs-dpo x launch.worker=2\n"
    assert settings_of(page) == {("ppo", "kl_coeff"), ("launch", "worker")}


def in_a_table(line: str) -> bool:
    return any(place(line, table) for table in (SMALLER, ELSEWHERE, NOT_HERE))


def how_it_is_tried(line: str) -> str | None:
    """What `test_what_is_too_long_would_start` does with a command that no table names; ``None``: nothing."""
    words = line.split()
    if words[0] == "make":
        return "make" if re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else None
    if words[0] == "python":
        module = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
        module = module.removeprefix("ppo_vs_dpo/")
        there = [ROOT / f"{module}.py", ROOT / module / "__main__.py"]
        return "helped" if any(file.is_file() for file in there) else None
    if words[0] != "ppo-vs-dpo":
        return None
    if words[1] in ("show", "plan", "paper", "doctor"):
        return "asked"
    return "looked at" if words[2 if words[1] in ("-m", "check") else 1] in experiments() else None


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The README's desk, and what the pages' readers have."""
    folder = make_desk(tmp_path_factory.mktemp("docs") / "desk")
    (folder / "smollm2").symlink_to(folder / "my_model")
    (folder / "pairs.jsonl").symlink_to(folder / "my_pairs.jsonl")
    (folder / "my_reward.py").write_text((folder / "my_judge.py").read_text())
    (folder / "my_configs" / "experiment").mkdir(parents=True)
    (folder / "my_configs" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\n  - _self_\n"
    )
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("images"))
    rows = [json.loads(line) for line in (folder / "my_pairs.jsonl").read_text().splitlines()]
    real = folder.parent / "shared" / "data" / "hh_rlhf"
    real.mkdir(parents=True)
    with gzip.open(real / "harmless_base.jsonl.gz", "wt") as out:
        for row in rows:
            turn = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
            out.write(json.dumps({side: turn + row[side] for side in ("chosen", "rejected")}) + "\n")
    beside = [line for page in PAGES for line in in_shell(page.read_text(encoding="utf-8")) if line.startswith(BESIDE)]
    for line in beside:
        typed(_as_it_stands(line), folder)
    assert (folder / "hh_single_turn.jsonl").stat().st_size > 0
    return folder


def _as_it_stands(line: str) -> str:
    """A line of `in_shell` as its page has it: a quoted program keeps its line ends."""
    begins = line.split("'")[0]
    for page in PAGES:
        found = re.search(re.escape(begins) + r"'[^']*'[^\n]*", page.read_text(encoding="utf-8"))
        if found:
            return found[0]
    raise AssertionError(line)


@pytest.mark.slow
@pytest.mark.parametrize("line", SMALLER)
def test_it_is_typed_and_ends_well(line, desk):
    """In the order above: later commands work on what earlier ones made."""
    typed(next(one for one in ALL if place(one, SMALLER) == line), desk, *SMALLER[line])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_what_is_too_long_would_start(page, desk, monkeypatch):
    """All that no table names: runs are looked at, benchmarks and make are asked what they would do."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr("ppo_vs_dpo.pipeline.composing.words.TRACKERS", {})
    # In this process: libraries are loaded once.
    monkeypatch.setattr(
        "ppo_vs_dpo.pipeline.checking.check.problems_of",
        lambda config, stages, environment=None: problems(OmegaConf.to_container(config, resolve=True), stages),
    )
    for line in commands_on(page):
        if is_mention(line) or in_a_table(line):
            continue
        how, words = how_it_is_tried(line), shlex.split(line)
        if how == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif how == "helped":
            asked = [sys.executable, *words[1:], "--help"]
            said = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            assert not [word for word in words if word.startswith("--") and word not in said], line
        elif how == "asked":
            assert dispatch(words[1:]) == 0, line
        else:
            words = [word for word in words[1:] if word not in ("-m", "check")]
            if "-m" in line.split():  # a sweep's first job
                words = [word if "[" in word else word.split(",")[0] for word in words]
            more = OWN if words[0] == "hh" and "data=" not in line else []
            assert dispatch(["check", *words, *more]) == 0, line
