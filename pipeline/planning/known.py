"""Sizes of models that papers start from, as published: a plan needs them before the Hub is reached, or has agreed.

Pythia: Biderman et al. 2023 (2304.01373), table 1; GPT-2, GPT-J, Llama 2 and 3, Mistral: the models' config.json.
"""

import re
from typing import Any

NEOX = {"model_type": "gpt_neox", "tie_word_embeddings": False, "max_position_embeddings": 2048}
LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}


def _sizes(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }


PYTHIA = {
    "70m": {**NEOX, "vocab_size": 50304, **_sizes(512, 6, 8, 2048)},
    "410m": {**NEOX, "vocab_size": 50304, **_sizes(1024, 24, 16, 4096)},
    "1b": {**NEOX, "vocab_size": 50304, **_sizes(2048, 16, 8, 8192)},
    "1.4b": {**NEOX, "vocab_size": 50304, **_sizes(2048, 24, 16, 8192)},
    "2.8b": {**NEOX, "vocab_size": 50304, **_sizes(2560, 32, 32, 10240)},
    "6.9b": {**NEOX, "vocab_size": 50432, **_sizes(4096, 32, 32, 16384)},
}
LLAMA_2_7B = {**LLAMA2, **_sizes(4096, 32, 32, 11008)}
LLAMA_2_13B = {**LLAMA2, **_sizes(5120, 40, 40, 13824)}
LLAMA_3_8B = {**LLAMA3, **_sizes(4096, 32, 32, 14336)}
LLAMA_3_70B = {**LLAMA3, **_sizes(8192, 80, 64, 28672)}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    **_sizes(4096, 32, 32, 14336),
}
GPT_2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
GPT_2_LARGE = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20}
GPT_J = {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "tie_word_embeddings": False}
# Hub name -> its sizes, for models whose name does not say them.
BY_NAME: dict[str, dict[str, Any]] = {
    "gpt2": GPT_2,
    "openai-community/gpt2": GPT_2,
    "gpt2-large": GPT_2_LARGE,
    "openai-community/gpt2-large": GPT_2_LARGE,
    "CarperAI/openai_summarize_tldr_sft": GPT_J,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "allenai/tulu-2-13b": LLAMA_2_13B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B": LLAMA_3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA_3_70B,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA_3_8B,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": {**LLAMA_3_8B, "vocab_size": 128264, "max_position_embeddings": 131072},
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B,
}
_PYTHIA = re.compile(r"pythia[-_]?(70m|410m|1\.4b|1b|2\.8b|6\.9b)", re.IGNORECASE)


def published_sizes(name: str) -> dict[str, Any] | None:
    """Keyword arguments of ``AutoConfig.for_model`` for a model whose sizes are known, else ``None``."""
    if name in BY_NAME:
        return dict(BY_NAME[name])
    found = _PYTHIA.search(name)
    return dict(PYTHIA[found.group(1).lower()]) if found else None
