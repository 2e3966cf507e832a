"""A prompt and a completion as one sequence of a reward model, put together as its own tokenizer does it."""

from collections.abc import Iterable, Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.models.text.encoding import encode_answers, encode_completions, encode_prompts
from ppo_vs_dpo.models.text.prompts import Prompt, is_conversational, render_prompt

CONTINUED, PAIRED, RENDERED = "continued", "paired", "rendered"
_PROBE = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]


class Row(list[int]):
    """Token ids of one sequence, with ``token_types`` where the tokenizer tells the two texts apart by them."""

    token_types: list[int] | None = None


def style_of(tokenizer: PreTrainedTokenizerBase, causal: bool, own_rule: bool) -> str:
    """How a reward model wants prompt and completion.

    - ``continued``: the prompt with the header of the answer, the answer, EOS: as a policy writes it, and as this
      project trains reward models.
    - ``paired``: ``tokenizer(prompt, completion)``, as encoders are trained ([CLS] prompt [SEP] completion [SEP]).
    - ``rendered``: the whole conversation by the chat template, with whatever it puts after an answer, as TRL and the
      cards of most published reward models do it; texts are continued.

    Args:
        causal: from `models.passes.scores.Reader`.
        own_rule: the model was trained elsewhere.
    """
    if not causal and tokenizer.num_special_tokens_to_add(pair=True) > 0:
        return PAIRED
    if own_rule and tokenizer.chat_template and _rendered_ends_otherwise(tokenizer):
        return RENDERED
    return CONTINUED


def _rendered_ends_otherwise(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        whole = _render(tokenizer, _PROBE)
    except (jinja2.TemplateError, ValueError):
        return False
    ours = [*encode_prompts(tokenizer, [_PROBE[:1]])[0], *encode_completions(tokenizer, [_PROBE[1:]])[0]]
    return list(whole) != ours


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def encode_sequences(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    finished: Iterable[bool] | None,
    style: str,
) -> list[list[int]]:
    """Token ids of ``N`` prompts and completions; ``finished`` says which completions ended (all by default).

    Raises:
        UserError: an empty prompt, a conversation without a chat template where one is needed.
    """
    ends = [True] * len(prompts) if finished is None else list(finished)
    if tokenizer.eos_token_id is None:
        ends = [False] * len(prompts)  # it has no token that would say so
    if style == PAIRED:
        return [_pair(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    whole = [row for row, end in enumerate(ends) if style == RENDERED and end and is_conversational(prompts[row])]
    rest = sorted(set(range(len(prompts))) - set(whole))
    rows: list[list[int]] = [[] for _ in prompts]
    for row in whole:
        answer = completions[row]
        answer = answer if is_conversational(answer) else [{"role": "assistant", "content": answer}]
        rows[row] = list(_render(tokenizer, [*prompts[row], *answer]))
    heads = encode_prompts(tokenizer, [prompts[row] for row in rest])
    tails, _ = encode_answers(
        tokenizer, [prompts[row] for row in rest], [completions[row] for row in rest], [ends[row] for row in rest]
    )
    for row, head, tail in zip(rest, heads, tails, strict=True):
        rows[row] = head + tail
    return rows


def _pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> Row:
    question = prompt
    if is_conversational(prompt):
        one = len(prompt) == 1
        question = str(prompt[0]["content"]) if one else _dialogue(tokenizer, prompt)
    answer = completion if isinstance(completion, str) else "\n\n".join(str(m["content"]) for m in completion)
    found = tokenizer(question, answer, verbose=False)
    row = Row(found["input_ids"])
    row.token_types = list(found["token_type_ids"]) if "token_type_ids" in found else None
    return row


def _dialogue(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """Several turns as the first text of a pair: by the chat template, or one after the other."""
    if tokenizer.chat_template:
        return render_prompt(tokenizer, messages)
    return "\n\n".join(str(message["content"]) for message in messages)
