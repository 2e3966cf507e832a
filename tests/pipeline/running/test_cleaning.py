"""`ppo-vs-dpo clean`: says what may go and what is lost; removes what was named, and never what the run needs."""

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.cli import dispatch


@pytest.fixture
def run(tmp_path):
    """A run with ppo done, dpo interrupted, an earlier result and paid replies."""
    root = tmp_path / "run"
    for name in ("ppo", "dpo", "sweep/ppo,kl_coef=0.0", ".replaced/ppo-1"):
        for part in ("checkpoints/checkpoint-4", "model"):
            (root / name / part).mkdir(parents=True)
            (root / name / part / "weights.bin").write_bytes(b"x" * 500_000)
    (root / "cache").mkdir()
    (root / "cache" / "judge_replies.jsonl").write_text("{}\n")
    (root / "config.yaml").write_text("seed: 1\n")
    made = RunFolder(root)
    for name in ("ppo", "ppo,kl_coef=0.0"):
        made.finish(name, "f", 1.0, {})
    return made


def test_it_says_what_may_go_and_touches_nothing(run, capsys):
    before = sorted(run.root.rglob("*"))
    assert dispatch(["clean", str(run.root)]) == 0
    said = capsys.readouterr().out
    assert "checkpoints       1.0 MB  may go; lost: a finished stage could not be shown along its training" in said
    assert "replaced          1.0 MB  may go" in said
    assert said.endswith(
        f"\nppo-vs-dpo clean {run.root} --remove checkpoints,replaced\n"
    )  # what there is, but for cache
    assert [path for path in sorted(run.root.rglob("*")) if path.name != ".lock"] == before


def test_what_is_named_is_removed_and_the_run_stays_whole(run, capsys):
    assert dispatch(["clean", str(run.root), "--remove", "all"]) == 0
    assert "checkpoints       1.0 MB  removed" in capsys.readouterr().out
    assert not run.path("ppo", "checkpoints").exists()
    assert not run.path(".replaced", "ppo-1").exists()
    assert run.done("ppo") is not None
    assert run.done("ppo,kl_coef=0.0") is not None
    # An interrupted stage goes on from its checkpoint; what was paid for goes by its own name only.
    assert run.path("dpo", "checkpoints", "checkpoint-4").is_dir()
    assert run.path("cache", "judge_replies.jsonl").is_file()
    dispatch(["clean", str(run.root)])
    assert "--remove" not in capsys.readouterr().out  # nothing is left that goes unnamed
    dispatch(["clean", str(run.root), "--remove", "cache"])
    assert not run.path("cache").exists()


def test_an_unknown_kind_is_refused(run):
    with pytest.raises(UserError, match="no such kind; there are checkpoints, replaced"):
        dispatch(["clean", str(run.root), "--remove", "models"])
