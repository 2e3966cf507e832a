"""Runs and small trained policies for the tests of the data room."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_vs_dpo.artifacts.files import write_json
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.preferences.__main__ import run_data, run_pairs
from ppo_vs_dpo.preferences.testbed.grammar import reviews
from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer
from tests import warm

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, data: dict, **sections) -> Path:
    """A run folder with a configuration and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"seed": 1, "data": data, **sections}), folder / "config.yaml")
    return folder


def run_step(folder: Path, step: str, fork: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """``python -m ppo_vs_dpo.preferences RUN --step STEP`` as the pipeline starts it; by default as a fork."""
    command = [sys.executable, "-m", "ppo_vs_dpo.preferences", str(folder), "--step", step]
    with warm.forks() if fork else contextlib.nullcontext():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


def run_here(folder: Path, step: str) -> None:
    """The same step in this process: no five seconds of imports."""
    {"data": run_data, "pairs": run_pairs}[step](StageContext(RunFolder(folder), step))


def log_of(folder: Path, what: str) -> Path | None:
    """The log of finished steps that a run keeps (`StepLog.of`); ``None`` before its first step."""
    found = sorted(path for path in (folder / "cache" / "pairs").glob(f"{what}-*.jsonl"))
    assert len(found) <= 1
    return found[0] if found else None


@pytest.fixture(scope="session")
def testbed_policy(tmp_path_factory) -> Path:
    """A policy that has learned to write reviews, more or less: 150 steps on the grammar."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = [
        tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        for prompt, completion in reviews(0, 2400)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = random.Random(0)
    for _ in range(150):
        batch = [torch.tensor(ids) for ids in rng.sample(texts, 32)]
        input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_policy(run: Path, policy: Path) -> Path:
    """Put a trained policy where the stage ``sft`` leaves it."""
    (run / "sft").mkdir(exist_ok=True)
    (run / "sft" / "model").symlink_to(policy, target_is_directory=True)
    write_json(run / "sft" / "done.json", {"stage": "sft", "figures": {}})
    return run


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A small Llama with random weights and a tokenizer of single bytes that takes any text and any conversation."""
    folder = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(byte_model, tmp_path_factory) -> Path:
    """The same model without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_pretrained(byte_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real HH and AlpacaEval files."""
    folder = Path(os.environ.get("RLHF_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (RLHF_REAL_DATA names another folder)")
    return folder
