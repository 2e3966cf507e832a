"""Rows in the real shape of each data set that a full configuration names, with short made-up texts."""

from typing import Any

from ppo_vs_dpo.preferences.constitution.endpoints import Answer

WORDS = ("llama", "camel", "goat", "sheep", "horse", "mule", "donkey", "yak", "bison", "deer", "elk", "moose", "hare")


def texts(number: int) -> tuple[str, str, str]:
    """A question, a better and a worse answer."""
    word, other = WORDS[number % len(WORDS)], WORDS[(number * 7 + 3) % len(WORDS)]
    return f"What is a {word} {number}?", f"An animal like a {other}.", f"A car {number}."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tldr(number: int) -> dict[str, Any]:
    """N+'s and Noukhovitch's comparisons: one file has what pairs, SFT and prompts need."""
    question, better, worse = texts(number)
    return {
        "query": f"SUBREDDIT: r/pets\n\nTITLE: {number}\n\nPOST: {question}\n\nTL;DR:",
        "reference_response": f" {better}<|endoftext|>",
        "chosen": f" {better}<|endoftext|>",
        "rejected": f" {worse}<|endoftext|>",
        "policies": "ref--sup1",
        "batch": "batch3",
    }


def hh(number: int) -> dict[str, Any]:
    question, better, worse = texts(number)
    opening = f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": opening + better, "rejected": opening + worse}


def safe_rlhf(number: int) -> dict[str, Any]:
    question, better, worse = texts(number)
    return {
        "prompt": question,
        "response_0": worse,
        "response_1": better,
        "is_response_0_safe": number % 3 == 0,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    }


def conversations(number: int) -> dict[str, Any]:
    """Tulu's preference mixes: both sides repeat the prompt."""
    question, better, worse = texts(number)
    return {
        "id": str(number),
        "source": "mix",
        "chosen": [user(question), assistant(better)],
        "rejected": [user(question), assistant(worse)],
    }


def ultrafeedback(number: int) -> dict[str, Any]:
    return {"prompt": texts(number)[0], **conversations(number), "score_chosen": 8.0, "score_rejected": 3.0}


def plain(number: int) -> dict[str, Any]:
    """TRL's stand-in for Ziegler's labels."""
    question, better, worse = texts(number)
    return {
        "prompt": question,
        "chosen": [user(question), assistant(better)],
        "rejected": [user(question), assistant(worse)],
    }


def gold_labelled(number: int) -> dict[str, Any]:
    question, better, worse = texts(number)
    return {"instruction": question, "input": "", "answers": [worse, better], "preference": 1}


def webgpt(number: int) -> dict[str, Any]:
    question, better, worse = texts(number)
    return {
        "question": {"full_text": question, "dataset": "eli5"},
        "answer_0": better,
        "answer_1": worse,
        "score_0": 0.5,
        "score_1": -0.5,
    }


def review(number: int) -> dict[str, Any]:
    """IMDb."""
    question, better, worse = texts(number)
    return {"text": f"{number} {question} {better} {worse} It is a film.", "label": 1}


def prompt(number: int) -> dict[str, Any]:
    return {"prompt": [user(texts(number)[0])]}


# The Hub's name, as the configurations have it -> its rows.
SHAPES = {
    "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144": tldr,
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144": tldr,
    "mnoukhov/summarize_from_feedback_oai_preprocessing_1706381144_relabel_pythia6.9b": tldr,
    "Anthropic/hh-rlhf": hh,
    "PKU-Alignment/PKU-SafeRLHF": safe_rlhf,
    "allenai/tulu-2.5-preference-data": conversations,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": conversations,
    "HuggingFaceH4/cai-conversation-harmless": ultrafeedback,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "princeton-nlp/mistral-instruct-ultrafeedback": ultrafeedback,
    "princeton-nlp/llama3-ultrafeedback": ultrafeedback,
    "trl-internal-testing/descriptiveness-sentiment-trl-style": plain,
    "tlc4418/1.4b-policy_preference_data_gold_labelled": gold_labelled,
    "openai/webgpt_comparisons": webgpt,
    "stanfordnlp/imdb": review,
}


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that is known: long answers, each told apart."""
    return [len(text) + 0.001 * (sum(map(ord, str(text))) % 97) for text in completions]


class Speaker:
    """Says something else for every seed, and prefers (A) or (B) by it."""

    def answer(self, requests):
        """See `preferences.constitution.endpoints.Model.answer`."""
        for number, request in enumerate(requests):
            yield number, Answer(f"{texts(request.seed % 1000)[1]} {request.seed % 7}", True)

    def choose(self, questions):
        """See `preferences.constitution.endpoints.Model.choose`."""
        for number, request in enumerate(questions):
            yield number, 1.0 if request.seed % 2 else -0.5


def speaker() -> Speaker:
    return Speaker()
