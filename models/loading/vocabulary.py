"""What two models must share, and a model and its tokenizer: the tokens."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError


def check_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Every token that the tokenizer can give must have an embedding.

    Raises:
        UserError: it has not.
    """
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and len(tokenizer) > size:
        raise UserError(
            f"{what} has {size} tokens and the tokenizer that writes its input {len(tokenizer)}: the two do not "
            f"belong together. Give the model's own tokenizer, or, where tokens were added to it, a model with as "
            f"many (model.resize_token_embeddings, before it was trained on them)."
        )


def check_same_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Policy and reference must give probabilities to the same tokens.

    Raises:
        UserError: the sizes differ.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    sizes = [
        getattr(m.config, "vocab_size", s) if s == 0 else s for m, s in zip((policy, reference), sizes, strict=True)
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the policy has {sizes[0]} tokens and the reference {sizes[1]}: KL and the DPO loss compare "
            f"probabilities of the same tokens. Use a policy and a reference with the same tokenizer."
        )
