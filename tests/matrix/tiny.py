"""Architectures in small: random weights, twenty tokens, two to four layers.

Each has something that the others lack: how positions are told, which places a token attends to, what the cache holds,
how the head is named, what is random in training.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOKENS = 20
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
GPT = {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
STATE = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **ENDS}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip

ARCHITECTURES: dict[str, dict] = {
    # packed rows
    "llama": {**GROUPED, "attention_dropout": 0.1},
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "gpt_neox": {**BASE, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    # absolute positions, dropout as modules and as numbers
    "gpt2": {**GPT, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {
        "vocab_size": TOKENS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.1, "layerdrop": 0.1, **ENDS,
    },
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **ENDS,
    },
    # distances instead of positions
    "bloom": {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, **ENDS},
    "mpt": {"vocab_size": TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **ENDS},
    "falcon": {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS},
    # windows, caps, scaled embeddings
    "mistral": {**GROUPED, "sliding_window": 4},
    "gemma": WIDE,
    "gemma2": {**WIDE, "sliding_window": 4},
    "gemma3_text": {**WIDE, "sliding_window": 4},
    # other blocks
    "phi": BASE,
    "phi3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "nemotron": GROUPED,
    "glm": WIDE,
    # experts, with the auxiliary loss of their router asked for
    "mixtral": {**GROUPED, "num_local_experts": 4, "output_router_logits": True, "router_jitter_noise": 0.1},
    "qwen3_moe": {**WIDE, **EXPERTS, "output_router_logits": True},
    "gpt_oss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "deepseek_v3": {**BASE, **LATENT},
    # recurrent and hybrid states
    "jamba": {
        **GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "qwen3_next": {**WIDE, **EXPERTS, **LINEAR},
    "mamba": STATE,
    "mamba2": {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "lfm2": {**GROUPED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {
        **WIDE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
    },
    # with images, which text does without
    "gemma3": {
        "text_config": {**WIDE, "sliding_window": 4, "model_type": "gemma3_text"},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
        },
        "mm_tokens_per_image": 4, "image_token_index": 19, **ENDS,
    },
    # others without a scalar head of their own in transformers
    "granite": GROUPED,
    "cohere": GROUPED,
}  # fmt: skip
# No model with a scalar head in transformers: a value model of another architecture must be given.
WITHOUT_VALUES = ("mamba", "mamba2", "lfm2", "falcon_h1", "granite", "cohere")
# States that padding reaches.
REFUSED: dict[str, dict] = {
    "rwkv": {
        "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "context_length": 64, **ENDS,
    },
    "recurrent_gemma": {
        **BASE, "lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1, "num_hidden_layers": 3,
    },
}  # fmt: skip

# Without a cache of keys and values, or with one of their own.
UNSAMPLED: dict[str, dict] = {
    "openai-gpt": GPT,
    "minimax": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def settings_of(name: str) -> dict:
    """What the configuration of an architecture is made from."""
    return dict({**ARCHITECTURES, **REFUSED, **UNSAMPLED}[name])


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model with weights large enough that every mistake shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **settings_of(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = 2
    return model.eval()
