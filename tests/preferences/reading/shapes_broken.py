"""Ways in which people break such files, and what must come of it: the pair, or a kind of problem and its words."""

import json

from tests.preferences.reading.shapes_public import ASKED, HELLO, TEXTS, lines, turns

PROMPT, CHOSEN, REJECTED = HELLO[0][:1], HELLO[0][1:], HELLO[1][1:]
CALL = {"tool_calls": [{"type": "function", "function": {"name": "zoo", "arguments": "{}"}}]}

# name -> (file ending, content, the pair or (kind, words))
BROKEN = {
    "a prompt column, and answers that share their first turns": (
        ".jsonl",
        lines(
            {
                "prompt": PROMPT,
                "chosen": turns("zoo()", "llama", "An animal.", roles=("assistant", "user")),
                "rejected": turns("zoo()", "llama", "A car.", roles=("assistant", "user")),
            }
        ),
        (
            ASKED[0],
            [("assistant", "zoo()"), ("user", "llama"), ("assistant", "An animal.")],
            [("assistant", "zoo()"), ("user", "llama"), ("assistant", "A car.")],
        ),
    ),
    "the prompt in the prompt column and again in both sides": (
        ".jsonl",
        lines({"prompt": PROMPT, "chosen": HELLO[0], "rejected": HELLO[1]}),
        ASKED,
    ),
    "the system message in the prompt column, the question in both sides": (
        ".jsonl",
        lines(
            {"prompt": [{"role": "system", "content": "Be brief."}], "chosen": HELLO[0], "rejected": HELLO[1]},
        ),
        ([("system", "Be brief."), *ASKED[0]], *ASKED[1:]),
    ),
    "a text prompt that both texts repeat": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": f"{TEXTS[0]} {TEXTS[1]}", "rejected": f"{TEXTS[0]} {TEXTS[2]}"}),
        (TEXTS[0], f" {TEXTS[1]}", f" {TEXTS[2]}"),
    ),
    "answers that begin alike, the question in a column of another name": (
        ".jsonl",
        lines({"request": "Capital of France?", "chosen": "The capital is Paris", "rejected": "The capital is Lyon"}),
        ("missing_field", "prompt=request"),
    ),
    "a prompt that is null": (
        ".jsonl",
        lines({"prompt": None, "chosen": "The capital is Rome", "rejected": "The capital is Oslo"}),
        ("missing_field", "prompt is empty (null)"),
    ),
    "a system column beside the prompt": (
        ".jsonl",
        lines({"system": "Be brief.", "prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        ("unread", "system=system"),
    ),
    "an input column beside the prompt": (
        ".jsonl",
        lines({"prompt": "Translate.", "input": "Lama", "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        ("unread", "input=input"),
    ),
    "messages as Python text, from pandas": (
        ".csv",
        "prompt,chosen,rejected\n"
        + ",".join('"' + str(part).replace('"', '""') + '"' for part in (PROMPT, CHOSEN, REJECTED))
        + "\n",
        ASKED,
    ),
    "messages as NumPy prints them": (
        ".csv",
        'chosen,rejected\n"'
        + '","'.join("[" + "\n ".join(map(str, side)) + "]" for side in HELLO).replace("'role'", "'role'")
        + '"\n',
        ASKED,
    ),
    "messages as text that is cut off": (
        ".jsonl",
        lines({"prompt": str(PROMPT)[:-2], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        ("wrong_type", "neither JSON nor Python"),
    ),
    "roles by other names": (
        ".jsonl",
        lines(
            {
                "prompt": turns(TEXTS[0], roles=("prompter",)),
                "chosen": turns(TEXTS[1], roles=("GPT",)),
                "rejected": turns(TEXTS[2], roles=("bot",)),
            }
        ),
        ASKED,
    ),
    "a role that nobody knows": (
        ".jsonl",
        lines({"prompt": turns(TEXTS[0], roles=("alice",)), "chosen": CHOSEN, "rejected": REJECTED}),
        ("wrong_type", "the role 'alice'"),
    ),
    "two columns of one name (CSV)": (
        ".csv",
        "prompt,chosen,rejected,chosen\nWhat is a llama?,An animal.,A car.,A hat.\n",
        ("twice", "chosen is there twice"),
    ),
    "two columns of one name (JSON)": (
        ".jsonl",
        '{"prompt": "What is a llama?", "chosen": "A hat.", "rejected": "A car.", "chosen": "An animal."}\n',
        ("twice", "chosen is there twice"),
    ),
    "tool calls": (
        ".jsonl",
        lines({"prompt": PROMPT, "chosen": [{**CHOSEN[0], **CALL}], "rejected": REJECTED}),
        ("not_text", "tool_calls"),
    ),
    "a column of tools": (
        ".jsonl",
        lines({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED, "tools": [{"name": "zoo"}]}),
        ("not_text", "tools"),
    ),
    "reasoning beside the answer": (
        ".jsonl",
        lines({"prompt": PROMPT, "chosen": [{**CHOSEN[0], "reasoning_content": "Hm."}], "rejected": REJECTED}),
        ("not_text", "reasoning_content"),
    ),
    "empty fields for tools and calls": (
        ".jsonl",
        lines(
            {
                "prompt": PROMPT,
                "chosen": [{**CHOSEN[0], "tool_calls": None, "function_call": None}],
                "rejected": [{**REJECTED[0], "tool_calls": []}],
                "tools": "[]",
                "images": None,
            }
        ),
        ASKED,
    ),
    "an answer that ends with the user": (
        ".jsonl",
        lines({"chosen": [*HELLO[0], *turns("Thanks!")], "rejected": [*HELLO[0], *turns("Bad bot")]}),
        ("not_assistant", "chosen ends with the user's words"),
    ),
    "one side goes on": (
        ".jsonl",
        lines({"chosen": HELLO[0], "rejected": [*HELLO[0], *turns("more", "b")]}),
        ("prompt_mismatch", "one conversation goes on where the other ends"),
    ),
    "sides that part before the last turn": (
        ".jsonl",
        lines({"chosen": [*HELLO[0], *turns("And?", "Yes.")], "rejected": [*HELLO[1], *turns("Oh?", "No.")]}),
        (
            ASKED[0],
            [*ASKED[1], ("user", "And?"), ("assistant", "Yes.")],
            [*ASKED[2], ("user", "Oh?"), ("assistant", "No.")],
        ),
    ),
    "a prompt that the conversations do not ask": (
        ".jsonl",
        lines({"prompt": "Name a river.", "chosen": HELLO[0], "rejected": HELLO[1]}),
        ("prompt_mismatch", "'Name a river.'"),
    ),
    "rendered text without a prompt column": (
        ".jsonl",
        lines({"chosen": "<s>[INST] Hi [/INST] The sky</s>", "rejected": "<s>[INST] Hi [/INST] The sea</s>"}),
        ("<s>[INST] Hi [/INST]", " The sky</s>", " The sea</s>"),
    ),
    "messages as columns of roles and contents": (
        ".json",
        json.dumps(
            [
                {
                    "prompt": {"role": ["user"], "content": [TEXTS[0]]},
                    "chosen": {"role": ["assistant"], "content": [TEXTS[1]]},
                    "rejected": {"role": ["assistant"], "content": [TEXTS[2]]},
                }
            ]
        ),
        ASKED,
    ),
    "a margin that is NaN, a score that is null": (
        ".jsonl",
        '{"prompt": "What is a llama?", "chosen": "An animal.", "rejected": "A car.", "margin": NaN, '
        '"chosen_score": null}\n',
        TEXTS,
    ),
    "a margin that is no number": (
        ".jsonl",
        '{"prompt": "What is a llama?", "chosen": "An animal.", "rejected": "A car.", "margin": Infinity}\n',
        ("wrong_type", "margin is inf"),
    ),
}
