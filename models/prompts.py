"""From a prompt (text or conversation) and a completion to token ids, in one place."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from artifacts.errors import UserError

Prompt = str | list[dict[str, Any]]


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt or completion is a list of messages."""
    return isinstance(prompt, list)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` for a tokenizer that cannot render conversations."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the prompts are conversations, and the tokenizer {tokenizer.name_or_path} has no chat template. "
            f"Use an instruction-tuned model, give one in model.chat_template=FILE, or data with plain-text prompts."
        )


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the policy continues: the prompt itself, or the conversation with the generation header."""
    if isinstance(prompt, str):
        return prompt
    require_chat_template(tokenizer)
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids that the policy continues: with the tokenizer's own special tokens, or the chat template's.

    Raises:
        UserError: an empty prompt, or a conversation without a chat template.
    """
    if not prompt:
        raise UserError("an empty prompt: there is nothing to continue.")
    if isinstance(prompt, str):
        return without_final_eos(tokenizer, tokenizer(prompt)["input_ids"])
    require_chat_template(tokenizer)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def without_final_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Some tokenizers end every text with EOS; a prompt must not end."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def completion_text(completion: Prompt) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: Prompt, finished: bool = True) -> list[int]:
    """Token ids of a completion, with EOS at the end when it is finished."""
    ids = tokenizer(completion_text(completion), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if finished else list(ids)


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of generated tokens, without special tokens and without tidying spaces."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def truncate_prompt(prompt_ids: list[int], max_length: int | None) -> list[int]:
    """Keep the last ``max_length`` tokens: the end of a prompt is what the response answers."""
    return prompt_ids if max_length is None else prompt_ids[-max_length:]
