"""Shared by all tests: one thread, no network, a tiny model and tokenizer built on the spot, the real data."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import pytest
import torch

from tests import warm

torch.set_num_threads(1)
# What tests import makes a million objects and no garbage: a fifth of that time would be the collector's.
gc.disable()


# Files whose tests take longest, to be begun first: the two workers then end together.
LONG = ("test_wheel.py", "test_trajectories.py", "test_device.py", "test_quickstart.py", "test_ranks.py")


def pytest_configure() -> None:
    """What is expected to the last digit is a CPU's; tests/device/test_real.py has the GPU (make test-gpu)."""
    if "PPO_VS_DPO_TEST_GPU" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; tests that share a fixture of their module meet in one worker, where it is made once."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if any(found[-1].scope == "module" for found in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded now stays: each later collection (transformers asks for one a training run) passes over it.

    And groups are groups: with a pytest that this pytest-xdist does not know, each worker makes every fixture anew.
    """
    grouped = session.config.getoption("loadgroup", False)
    for item in session.items:
        if grouped and item.get_closest_marker("xdist_group") is not None and "@" not in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid} is in no group of pytest-xdist's: take the pair of constraints.txt"
            )
    gc.freeze()
    gc.enable()


@pytest.fixture
def forked():
    """Programs of this project that the test starts are forks of this process (`tests.warm`)."""
    with warm.forks():
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real HH and AlpacaEval files; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("RLHF_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder} (set RLHF_REAL_DATA)")
    return folder


WORDS = ["the", "film", "was", "good", "bad", "and", "dull", "bright", "very", "not", "plot", "cast", "a", "story"]


def build_word_tokenizer():
    """A word-level tokenizer of 20 tokens with distinct <pad>, <s>, </s>, <unk> and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def word_tokenizer():
    """The tokenizer of `build_word_tokenizer`."""
    return build_word_tokenizer()


@pytest.fixture
def tiny_llama(word_tokenizer):
    """A function that builds a Llama of about 10 thousand parameters: ``tiny_llama(seed=0, **config)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(word_tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.5,
            "bos_token_id": word_tokenizer.bos_token_id,
            "eos_token_id": word_tokenizer.eos_token_id,
            "pad_token_id": word_tokenizer.pad_token_id,
        }
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()

    return build
