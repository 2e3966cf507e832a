"""A small finished run with random models, and a gold function that configurations can name."""

import itertools
from pathlib import Path

import jsonschema
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ppo_vs_dpo.artifacts.files import read_json, write_json, write_parquet, write_text
from ppo_vs_dpo.compare.frontier.exact import kl_divergence, optimal_policy
from ppo_vs_dpo.preferences.schema import prompt_id

STARTS = ["the film", "a story", "the plot", "the cast", "a film", "the story"]
MIDDLES = ["was very", "was not", "was", "and the plot was", "and a cast was"]
MIDDLES += ["was good and", "was bad and", "was dull and"]
PROMPTS = [f"{start} {middle}" for start, middle in itertools.product(STARTS, MIDDLES)]
HASH = "ab" * 32


def gold(prompts, completions, finished=None, **columns):
    """Good words minus bad words, a little for ending."""
    finished = finished or [True] * len(prompts)
    return [
        text.split().count("good") - text.split().count("bad") + 0.25 * bool(end)
        for text, end in zip(completions, finished, strict=True)
    ]


def nan_gold(prompts, completions, **columns):
    """A judge with a hole in it."""
    return [float("nan") if number == 3 else 0.0 for number in range(len(prompts))]


def tie_gold(prompts, completions, **columns):
    """A judge that always ties."""
    return [0.0] * len(prompts)


def done(root: Path, name: str, **figures) -> None:
    """A stage's last word."""
    folder = root / "sweep" / name if "," in name else root / name
    last_word = {"stage": name, "fingerprint": name, "finished": "-", "seconds": 2.5, "figures": figures}
    write_json(folder / "done.json", last_word)


def small_model(tokenizer, cls=LlamaForCausalLM, seed=0, **overrides):
    """A Llama with random weights."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return cls(LlamaConfig(**{**settings, **overrides})).eval()


def make_run(root: Path, tokenizer, moved=(0, 0.03, 0.04, 0.08, 0.02)) -> Path:
    """A run folder with sft, ppo, dpo, a sweep point of each, a reward model, pairs and prompts."""
    reference = small_model(tokenizer)
    pair_set = {"hash": HASH, "n_train": 4, "n_test": 2}
    for number, name in enumerate(["sft", "ppo", "dpo", "ppo,kl_coef=0.0", "dpo,beta=1.0"]):
        model = small_model(tokenizer)
        # Policies are the reference, moved by a little (the sweep points: by more, by less).
        torch.manual_seed(number)
        with torch.no_grad():
            for weight, start in zip(model.parameters(), reference.parameters(), strict=True):
                weight.copy_(start + moved[number] * torch.randn_like(start))
        folder = root / "sweep" / name if "," in name else root / name
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        done(root, name, pair_set=pair_set)
    small_model(tokenizer, LlamaForSequenceClassification, seed=9, num_labels=1).save_pretrained(
        root / "reward_model" / "model"
    )
    tokenizer.save_pretrained(root / "reward_model" / "model")
    write_json(
        root / "reward_model" / "report.json", {"accuracy": 0.7, "ceiling": 0.8, "of_ceiling": 0.6, "ece": 0.03}
    )
    done(root, "reward_model", pair_set=pair_set)
    done(root, "pairs", pair_set=pair_set)
    pair = {"chosen": " good", "rejected": " bad", "pair_id": "y"}
    write_parquet(root / "pairs" / "train.parquet", [{"prompt": "a good film was", **pair, "prompt_id": "x"}])
    write_parquet(root / "pairs" / "test.parquet", [{"prompt": "a bad film was", **pair, "prompt_id": "v"}] * 3)
    write_prompts(root / "data" / "prompts_heldout.parquet", PROMPTS)
    write_prompts(root / "data" / "prompts_train.parquet", ["a dull film"])
    write_text(
        root / "config.yaml",
        "seed: 3\ndata: {gold: tests.compare.helpers:gold}\nmodel: {path: null}\n"
        "compare: {max_new_tokens: 12, resamples: 200, pool_size: 8, best_of_n: [2, 4]}\n",
    )
    return root


def write_prompts(path: Path, prompts: list[str]) -> None:
    """A prompts file."""
    write_parquet(path, {"prompt": prompts, "prompt_id": [prompt_id(prompt) for prompt in prompts]})


def set_config(root: Path, settings: str) -> None:
    """Put further settings into the section compare of a run's configuration."""
    path = root / "config.yaml"
    path.write_text(path.read_text().replace("resamples: 200", f"{settings}, resamples: 200"))


SCHEMA = Path(__file__).parents[2] / "compare" / "report" / "report.schema.json"


def check_schema(report: dict) -> dict:
    """The report, which has the shape that ``compare/report/report.schema.json`` writes down."""
    validator = jsonschema.Draft202012Validator(read_json(SCHEMA))
    errors = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in validator.iter_errors(report)]
    assert not errors, "\n".join(errors[:10])
    return report


def exact_frontier(reference, reward, betas):
    """``(B, 2)`` KL and expected reward of pi* at every beta, by rising KL: no policy lies above this curve."""
    points = [optimal_policy(reference, reward, beta) for beta in betas]
    curve = np.array([[kl_divergence(point, reference), point @ reward] for point in points])
    return curve[np.argsort(curve[:, 0], kind="stable")]
