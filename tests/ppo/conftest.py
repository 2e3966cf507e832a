"""A tiny policy, a reward that can be counted, and a trainer on them."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

PROMPTS = ["the film", "a story was", "very", "the plot was", "the cast", "a bad film", "not", "a bright plot and"]

# Responses of up to T tokens as the pure functions see them: whole, with gaps, empty, of length 1.
T = 7
GAPS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def ones(*shape):
    """A mask without padding."""
    return torch.ones(*shape, dtype=torch.bool)


@pytest.fixture
def draw():
    """Random float64 tensors from one seeded generator."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return make


def count_good(prompts, completions, **columns):
    """How often a completion says good: what the tests reward."""
    return [float(completion.split().count("good")) for completion in completions]


def logs(trainer, key="objective/kl"):
    """The rows of a trainer's log that hold a figure."""
    return [row for row in trainer.state.log_history if key in row]


def same(a, b):
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untimed(rows):
    """Log rows without the times, which no two runs share."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.fixture
def prompts():
    """Eight prompts, four times over."""
    return Dataset.from_dict({"prompt": PROMPTS * 4})


@pytest.fixture
def tiny_reward(tiny_llama):
    """A function that builds a reward model on a tiny Llama's backbone: ``tiny_reward(seed=0)``."""

    def build(seed: int = 0, **overrides):
        config = tiny_llama(seed, **overrides).config
        config.num_labels = 1
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config).eval()

    return build


@pytest.fixture
def make_trainer(tmp_path, tiny_llama, word_tokenizer, prompts):
    """A function that builds a `PPOTrainer`; keywords are `PPOConfig`'s, those in ``parts`` the trainer's."""
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    def build(parts=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "rollout_batch_size": 16,
            "max_steps": 2,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "response_length": 8,
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "diagnose": False,
            "seed": 7,
        }
        policy = tiny_llama(0, initializer_range=0.2)
        with torch.no_grad():  # likelier to end: responses of different lengths
            policy.lm_head.weight[word_tokenizer.eos_token_id] += 3 * policy.lm_head.weight[10]
        standard = {
            "model": policy,
            "reward_funcs": count_good,
            "train_dataset": prompts,
            "processing_class": word_tokenizer,
        }
        standard.update(parts or {})
        if standard.get("reward_model") is not None and "reward_funcs" not in (parts or {}):
            standard["reward_funcs"] = None
        return PPOTrainer(args=PPOConfig(**{**defaults, **settings}), **standard)

    return build


@pytest.fixture
def weights():
    """A function that copies the trained tensors of a trainer: ``weights(trainer)``."""

    from ppo_vs_dpo.ppo.checkpoints.saving import trained_tensors

    def copy(trainer):
        return {name: tensor.detach().clone() for name, tensor in trained_tensors(trainer.model).items()}

    return copy
