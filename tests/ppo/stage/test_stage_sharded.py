"""The stage ppo as a cluster runs it: ``torchrun -m ppo_vs_dpo.ppo RUN`` with a DeepSpeed section, models split as
they load."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_vs_dpo.artifacts.files import read_jsonl
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.ppo.stage.train import run_stage
from tests.ppo.stage.test_train import run_folder  # noqa: F401 (a fixture)
from tests.ranks import launch, settings_of

LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "settings"),
    [
        ("zero2", {}),
        ("zero3", {}),
        ("zero3", {"value_from": "policy"}),
        ("zero3", {"lora": LORA}),
        ("zero2", {"lora": LORA}),
    ],
)
def test_two_processes(run_folder, tmp_path, deepspeed, settings):  # noqa: F811
    """The figures of one process, and a model that loads without DeepSpeed."""
    run = run_folder(lr_scheduler_type="constant", eval_strategy="no", **settings)
    run_stage(StageContext(run, "ppo"))
    alone = [row for row in read_jsonl(run.path("ppo", "metrics.jsonl")) if "objective/kl" in row]
    expected = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    run.clear("ppo")

    run.config.deepspeed = settings_of(deepspeed)
    OmegaConf.save(run.config, run.path("config.yaml"))
    said = launch(run, "ppo")
    sharded = [row for row in read_jsonl(run.path("ppo", "metrics.jsonl")) if "objective/kl" in row]
    for name in ("loss/policy_avg", "loss/value_avg", "objective/kl"):
        residual = torch.tensor([a[name] - b[name] for a, b in zip(alone, sharded, strict=True)]).abs()
        assert residual.max() <= 1e-4, name
    saved = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    for mine, theirs in zip(expected.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(run.path("ppo", "model")).chat_template
    assert run.done("ppo")["figures"]["updates"] == 4
    for rank in (0, 1):
        (line,) = [line for line in said.splitlines() if line.startswith(f"rank {rank} holds policy")]
        for role in ("value", "reward", "master", "optimizer"):
            assert f" {role} " in line
