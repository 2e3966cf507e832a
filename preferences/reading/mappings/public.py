"""Public preference sets whose rows are not TRL's: one short function each."""

import json
import re
from dataclasses import replace
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.mappings.base import (
    FilteredError,
    MappingOptions,
    UnmappableError,
    choice_of,
    flag_of,
    is_null,
    number_of,
    value_of,
)
from ppo_vs_dpo.preferences.reading.mappings.conversations import conversation_pair
from ppo_vs_dpo.preferences.reading.mappings.general import pairs
from ppo_vs_dpo.preferences.reading.mappings.messages import Message, message, messages_of, parsed, user_turn


def orca(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Orca DPO pairs (Intel's, Argilla's): system message, question, two answers."""
    if row.get("status") == "tie":
        raise FilteredError("tie")
    question = "question" if "question" in row else "input"
    return pairs(row, replace(options, columns={"prompt": question, "system": "system"}))


def llama_factory(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """LLaMA-Factory's ranking format: instruction (and input), two answers, perhaps system message and history."""
    names = {"prompt": "instruction", "input": "input", "system": "system", "history": "history"}
    pair = pairs(row, replace(options, columns={part: name for part, name in names.items() if name in row}))
    if isinstance(pair["prompt"], str):
        pair["prompt"] = user_turn(pair["prompt"])
        pair |= {side: [message("assistant", pair[side])] for side in ("chosen", "rejected")}
    return pair


def openai(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """OpenAI's preference fine-tuning format: ``input.messages``, ``preferred_output``, ``non_preferred_output``."""
    given = value_of(row, "input", dict)
    sides = {
        "chosen": value_of(row, "preferred_output", list),
        "rejected": value_of(row, "non_preferred_output", list),
    }
    return pairs({"prompt": value_of(given, "messages", list), "tools": given.get("tools"), **sides}, options)


def tldr(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """N+'s preprocessed TL;DR comparisons (``query``, ``chosen``, ``rejected``): the end-of-text mark is taken off."""
    prompt = value_of(row, "query").strip()
    chosen, rejected = (value_of(row, side).replace("<|endoftext|>", "") for side in ("chosen", "rejected"))
    return {"prompt": prompt, "chosen": " " + chosen.strip(), "rejected": " " + rejected.strip(), **_labelling(row)}


def summarize(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """OpenAI's comparisons of summaries as published (Stiennon et al. 2020): ``info``, ``summaries``, ``choice``."""
    info, choice = value_of(row, "info", dict), choice_of(row, "choice")
    texts = [value_of(item, "text").strip() for item in value_of(row, "summaries", list)]
    if len(texts) != 2:
        raise UnmappableError("wrong_type", f"{len(texts)} summaries; two are needed")
    if info.get("article") is not None:
        prompt = f"Article: {value_of(info, 'title')}\n\n{value_of(info, 'article')}\n\nTL;DR:"
    else:
        parts = (f"SUBREDDIT: r/{value_of(info, 'subreddit')}", f"TITLE: {value_of(info, 'title')}")
        prompt = "\n\n".join([*parts, f"POST: {value_of(info, 'post')}", "TL;DR:"])
    return {
        "prompt": prompt,
        "chosen": f" {texts[choice]}",
        "rejected": f" {texts[1 - choice]}",
        **_labelling(row),
    }


def _labelling(row: dict[str, Any]) -> dict[str, str]:
    """Which batch of labels a comparison is from, and which policies wrote the two summaries."""
    found = {"batch": row.get("batch")}
    summaries, choice = row.get("summaries"), row.get("choice")
    if isinstance(summaries, list) and len(summaries) == 2 and choice in (0, 1):
        found |= {
            "chosen_policy": summaries[choice].get("policy"),
            "rejected_policy": summaries[1 - choice].get("policy"),
        }
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def shp(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Stanford SHP: two comments on a post; ``labels`` is 1 where A has more votes."""
    label = choice_of(row, "labels")
    known = not is_null(row.get("score_ratio"))
    if options.min_score_ratio > 0 and (not known or number_of(row, "score_ratio") < options.min_score_ratio):
        raise FilteredError(f"score ratio below {options.min_score_ratio:g}")
    sides = ("A", "B") if label == 1 else ("B", "A")
    texts = [value_of(row, f"human_ref_{side}") for side in sides]
    pair = {"prompt": value_of(row, "history"), "chosen": texts[0], "rejected": texts[1]}
    if "score_A" in row and "score_B" in row:
        scores = [number_of(row, f"score_{side}") for side in sides]
        pair |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return pair


def safe_rlhf(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """PKU-SafeRLHF: two responses, one better (more helpful), one safer."""
    names = {"helpful": "better_response_id", "safe": "safer_response_id"}
    if options.dimension not in names:
        raise UserError(f"data.dimension is {options.dimension!r}; it must be helpful or safe.")
    winner = choice_of(row, names[options.dimension])
    if options.drop_both_unsafe or options.drop_both_safe:
        safe = [flag_of(row, f"is_response_{side}_safe") for side in (0, 1)]
        if options.drop_both_unsafe and not any(safe):
            raise FilteredError("both responses unsafe")
        if options.drop_both_safe and all(safe):
            raise FilteredError("both responses safe")
    texts = [value_of(row, f"response_{side}") for side in (winner, 1 - winner)]
    return {"prompt": value_of(row, "prompt"), "chosen": texts[0], "rejected": texts[1]}


def alpaca_eval(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """AlpacaEval annotations: ``preference`` in [1, 2] is the weight of output 2; 0 and 1.5 are ties.

    The scores are the judge's probabilities of the two answers.
    """
    preference = number_of(row, "preference")
    if preference in (0, 1.5):
        raise FilteredError("tie")
    if not 1 <= preference <= 2:
        raise UnmappableError("wrong_type", f"preference is {preference}, it must be between 1 and 2 (or 0 for a tie)")
    share = preference - 1
    order = (2, 1) if share > 0.5 else (1, 2)
    texts = [value_of(row, f"output_{number}") for number in order]
    scores = {"chosen_score": max(share, 1 - share), "rejected_score": min(share, 1 - share)}
    return {"prompt": value_of(row, "instruction"), "chosen": texts[0], "rejected": texts[1], **scores}


def webgpt(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """WebGPT comparisons (Nakano et al. 2021): the answer with the higher score; equal scores are a tie."""
    question = row.get("question")
    prompt = value_of(question, "full_text") if isinstance(question, dict) else value_of(row, "question")
    answers = [(number_of(row, f"score_{n}"), value_of(row, f"answer_{n}")) for n in (0, 1)]
    return _best_and_worst(prompt, answers)


def gold_labelled(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Coste et al. 2023 (``tlc4418/...gold_labelled``): two answers, ``preference`` names the better."""
    answers, better = value_of(row, "answers", list), choice_of(row, "preference")
    if len(answers) != 2:
        raise UnmappableError("wrong_type", f"{len(answers)} answers; two are needed")
    asked = "\n".join(text for text in (value_of(row, "instruction"), row.get("input") or "") if text)
    return {"prompt": asked, "chosen": answers[better], "rejected": answers[1 - better]}


def nectar(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Berkeley Nectar: the answer of the first rank against that of the last of its seven."""
    answers = [(-number_of(item, "rank"), value_of(item, "answer")) for item in value_of(row, "answers", list)]
    pair = _best_and_worst(user_turn(value_of(row, "prompt").rstrip()), answers)
    pair |= {side: [message("assistant", pair[side].strip())] for side in ("chosen", "rejected")}
    return {name: pair[name] for name in ("prompt", "chosen", "rejected")}


def ultrafeedback_raw(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """UltraFeedback as published: the best against the worst of its completions by ``overall_score``."""
    answers = [
        (number_of(item, "overall_score"), value_of(item, "response"))
        for item in value_of(row, "completions", list)
        if not is_null(item.get("overall_score"))  # an answer that was not rated is not compared
    ]
    if len(answers) < 2 <= len(row["completions"]):
        raise FilteredError("fewer than two rated answers")
    return _best_and_worst(value_of(row, "instruction"), answers)


def _best_and_worst(prompt, answers: list[tuple[float, str]]) -> dict[str, Any]:
    """The answer with the highest score against that with the lowest; the first of equals."""
    if len(answers) < 2:
        raise UnmappableError("missing_field", f"{len(answers)} answers; a pair needs two")
    best, worst = max(answers, key=lambda item: item[0]), min(answers, key=lambda item: item[0])
    if best[0] == worst[0]:
        raise FilteredError("tie")
    scores = {"chosen_score": best[0], "rejected_score": worst[0]}
    return {"prompt": prompt, "chosen": best[1], "rejected": worst[1], **scores}


def helpsteer(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """HelpSteer2's preferences and HelpSteer3: a strength from -3 (the first is much better) to 3 (the second is).

    Its size is the pair's margin.
    """
    third = "overall_preference" in row
    strength = number_of(row, "overall_preference" if third else "preference_strength")
    if strength == 0:
        raise FilteredError("tie")
    names = ("response1", "response2") if third else ("response_1", "response_2")
    better, worse = names if strength < 0 else names[::-1]
    prompt = value_of(row, "context" if third else "prompt", (str, list))
    prompt = helpsteer_turns(prompt) if isinstance(prompt, str) else prompt
    sides = {"chosen": value_of(row, better), "rejected": value_of(row, worse)}
    return {**pairs({"prompt": prompt, **sides}, MappingOptions()), "margin": abs(float(strength))}


_NEMO_TURN = re.compile(r"<extra_id_1>(User|Assistant|System)\n?")


def helpsteer_turns(prompt: str) -> list[Message]:
    """HelpSteer2's prompts: what stands before the first ``<extra_id_1>`` is the user's, each mark names the next."""
    first, *others = _NEMO_TURN.split(prompt)
    turns = [("User", first), *zip(others[::2], others[1::2], strict=True)]
    return [message(role.lower(), text.strip()) for role, text in turns]


def stack_exchange(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """StackExchange paired (``lvwerra/stack-exchange-paired``): answer j has more votes than answer k."""
    texts = [value_of(row, f"response_{side}") for side in "jk"]
    return {"prompt": value_of(row, "question"), "chosen": texts[0], "rejected": texts[1]}


def stack_exchange_votes(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """StackExchange preferences (``HuggingFaceH4``): the best answer against the worst by ``pm_score``."""
    answers = [(number_of(item, "pm_score"), value_of(item, "text")) for item in value_of(row, "answers", list)]
    return _best_and_worst(value_of(row, "question"), answers)


def argilla(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Argilla's binarized sets: ``instruction``, ``chosen_response``, ``rejected_response`` and their ratings."""
    names = {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}
    return pairs(row, replace(options, columns=names))


def unified_feedback(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Unified-Feedback: two conversations and a rating each."""
    scores = {side: number_of(row, f"conv_{side}_rating") for side in "AB"}
    if scores["A"] == scores["B"]:
        raise FilteredError("tie")
    better, worse = sorted("AB", key=scores.get, reverse=True)
    sides = (messages_of(value_of(row, f"conv_{side}", list), f"conv_{side}") for side in (better, worse))
    return {**conversation_pair(None, *sides), "chosen_score": scores[better], "rejected_score": scores[worse]}


def reward_bench_2(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """RewardBench 2: the first of the correct answers against the first of the others."""
    sides = {side: value_of(row, side, list) for side in ("chosen", "rejected")}
    for side, answers in sides.items():
        if not answers or not isinstance(answers[0], str):
            raise UnmappableError("wrong_type", f"{side} must hold answers")
    return {"prompt": value_of(row, "prompt"), **{side: answers[0] for side, answers in sides.items()}}


def arena(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Chatbot Arena battles (LMSYS, LMArena): two conversations, or lists of turns as JSON; ties are left out."""
    if "winner" in row:
        winner = value_of(row, "winner")
    else:
        votes = [name for name in ("model_a", "model_b") if flag_of(row, f"winner_{name}")]
        if len(votes) > 1:
            raise UnmappableError("wrong_type", "winner_model_a and winner_model_b are both 1")
        winner = votes[0] if votes else "tie"
    if winner not in ("model_a", "model_b"):
        raise FilteredError("tie")
    better, worse = ("a", "b") if winner == "model_a" else ("b", "a")
    return conversation_pair(None, *(_battle(row, side) for side in (better, worse)))


def _battle(row: dict[str, Any], side: str) -> list:
    name = f"conversation_{side}"
    if name in row:
        found = parsed(row[name], name)
        turns = messages_of(found if isinstance(found, list) else value_of(row, name, list), name)
        # MT-Bench's votes are on the first of two turns, or on the second: what came after was not seen.
        judged = row.get("turn")
        users = [place for place, item in enumerate(turns) if item["role"] == "user"]
        return turns[: users[judged]] if isinstance(judged, int) and 0 < judged < len(users) else turns
    turns = [_strings(row, "prompt"), _strings(row, f"response_{side}")]
    if len(turns[0]) != len(turns[1]):
        raise UnmappableError("wrong_type", f"{len(turns[0])} prompts and {len(turns[1])} responses of {side}")
    both = zip(*turns, strict=True)
    return [message(role, text) for turn in both for role, text in zip(("user", "assistant"), turn, strict=True)]


def _strings(row: dict[str, Any], name: str) -> list[str]:
    """A list of turns, as it is or as JSON; a turn that was never answered is null."""
    value = value_of(row, name, (str, list))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UnmappableError("empty", f"{name} has a turn that is null or no text")
    return value
