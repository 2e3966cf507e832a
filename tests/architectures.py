"""Tiny random models of many architectures, for tests that a rule holds for all of them.

Sizes are the least that each family takes; weights are large enough that no difference hides in rounding.
"""

from typing import Any

import torch
from transformers import AutoConfig

_SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EIGHT = {**_SIZE, "head_dim": 8, "num_key_value_heads": 2}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": _SIZE,
    "mistral": {**_SIZE, "num_key_value_heads": 2},
    "qwen2": {**_SIZE, "num_key_value_heads": 2},
    "qwen3": _EIGHT,
    "gemma": _EIGHT,
    "gemma2": {**_EIGHT, "sliding_window": 4},
    "phi": _SIZE,
    "phi3": {**_SIZE, "num_key_value_heads": 4},
    "stablelm": {**_SIZE, "num_key_value_heads": 4},
    "gpt_neox": _SIZE,
    "gpt2": _OLD,
    "gptj": {**_OLD, "rotary_dim": 4},
    "opt": {**_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _SIZE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mixtral": {**_SIZE, "num_local_experts": 4, "num_key_value_heads": 2},
    "qwen2_moe": {
        **_SIZE,
        "num_experts": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _SIZE,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "roberta": _SIZE,
    "electra": {**_SIZE, "embedding_size": 32},
    "albert": {**_SIZE, "embedding_size": 32},
    "deberta-v2": {**_SIZE, "pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {**_SIZE, "cls_token_id": 1, "sep_token_id": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "bart": {**_SEQ2SEQ, "max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}


def tiny(kind: str, auto: type, vocabulary: int = 20, seed: int = 1, **more: Any) -> torch.nn.Module:
    """A model of a family with random weights; pad, bos and eos are tokens 0, 1 and 2.

    Args:
        kind: a key of `DECODERS` or `ENCODERS`.
        auto: ``AutoModelForSequenceClassification`` and the like.
        vocabulary: tokens.
        seed: of the weights.
        more: further values of the config.
    """
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"vocab_size": vocabulary, **ids, **(DECODERS | ENCODERS)[kind], **more}
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return model
