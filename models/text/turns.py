"""Answers of several turns: the conversation as the chat template writes it, with the assistant's own words marked."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.text.prompts import encode_completion, encode_prompt

Messages = list[dict[str, Any]]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, turns: Messages, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of what follows a prompt, where others speak between the assistant's turns.

    Each of the assistant's turns has the tokens that it has as a single answer to the conversation before it (so that
    what is trained is what is sampled); what stands between them is the template's.

    The first and the last of the ``turns`` are the assistant's; ``finished``: the last one has its EOS.

    Returns:
        The token ids, and for each of them 1 where it is the assistant's own, EOS included, and 0 where it is not.

    Raises:
        UserError: the turns do not begin and end with the assistant's, or the template rewrites earlier turns once
            others follow (some take reasoning out): there is then no one sequence that holds them all.
    """
    if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        raise UserError(
            f"a completion must begin and end with the assistant's words, and this has "
            f"{', '.join(turn['role'] for turn in turns)}."
        )
    start = len(encode_prompt(tokenizer, prompt))
    whole = encode_prompt(tokenizer, [*prompt, *turns[:-1]])
    mask = [0] * len(whole)
    for number, turn in enumerate(turns[:-1]):
        if turn["role"] != "assistant":
            continue
        head = encode_prompt(tokenizer, [*prompt, *turns[:number]])
        answer = encode_completion(tokenizer, [turn], finished=False)
        end = len(head) + len(answer)
        if whole[:end] != [*head, *answer]:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} writes the turn {turn['content'][:60]!r} otherwise "
                f"once other turns follow it. Leave such pairs out with data.on_problem.several_turns=drop."
            )
        # The token that ends the turn is the assistant's too, where it is the one that ends an answer.
        end += whole[end : end + 1] == [tokenizer.eos_token_id]
        mask[len(head) : end] = [1] * (end - len(head))
    last = encode_completion(tokenizer, [turns[-1]], finished)
    return [*whole[start:], *last], [*mask[start:], *[1] * len(last)]
