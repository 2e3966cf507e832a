"""Ways in which people break such files, and what must come of it: the pair, or a kind of problem and its words."""

import json

from tests.preferences.reading.shapes_public import ASKED, HELLO, TEXTS, TREE, lines, turns

PROMPT, CHOSEN, REJECTED = HELLO[0][:1], HELLO[0][1:], HELLO[1][1:]
SIDES = {"chosen": HELLO[0], "rejected": HELLO[1]}
ANSWERS = {"chosen": CHOSEN, "rejected": REJECTED}
NAN = float("nan")
ASK = "\n\nHuman: Llama?\n\nAssistant:"
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
    "a context before the question, whose column is the likelier prompt": (
        ".jsonl",
        lines({"context": "A map.", "question": "Which one?", "chosen": "That is Paris", "rejected": "That is Lyon"}),
        ("missing_field", "prompt=question"),
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
    "a preference that is NaN": (
        ".jsonl",
        '{"context": [{"role": "user", "content": "Hi"}], "response1": "a", "response2": "b", '
        '"overall_preference": NaN}\n',
        ("missing_field", "overall_preference is empty"),
    ),
    "a score that is NaN": (
        ".jsonl",
        '{"question": "Hi", "answer_0": "a", "answer_1": "b", "score_0": NaN, "score_1": 0.5}\n',
        ("missing_field", "score_0 is empty"),
    ),
    "messages as JSON whose first key is another": (
        ".jsonl",
        lines({"prompt": TEXTS[0], **{s: json.dumps([{"id": 1, **m} for m in side]) for s, side in SIDES.items()}}),
        ASKED,
    ),
    "messages in an object": (
        ".jsonl",
        lines({s: {"messages": side} for s, side in SIDES.items()}),
        ASKED,
    ),
    "messages in an object, as JSON beside a prompt": (
        ".jsonl",
        lines({"prompt": TEXTS[0], **{s: json.dumps({"messages": side}) for s, side in SIDES.items()}}),
        ASKED,
    ),
    "answers that are JSON are no messages": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": '{"value": 3}', "rejected": '[{"value": 4}]'}),
        (TEXTS[0], '{"value": 3}', '[{"value": 4}]'),
    ),
    "lists of one text, printed": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": "['An animal.']", "rejected": "['A car.']"}),
        ("wrong_type", "chosen is the text of a list"),
    ),
    "thoughts under a name of their own": (
        ".jsonl",
        lines({"prompt": PROMPT, "chosen": [{**CHOSEN[0], "thoughts": "Hm."}], "rejected": REJECTED}),
        ("not_text", "thoughts"),
    ),
    "a column of functions": (
        ".jsonl",
        lines({"functions": '[{"name": "zoo"}]', "prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        ("not_text", "functions"),
    ),
    **{
        f"text in a column {name} beside the prompt": (
            ".jsonl",
            lines({name: value, "prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
            ("unread", f"{role}={name}"),
        )
        for name, role, value in (
            ("system_instruction", "system", "Be brief."),
            ("developer", "system", "Be brief."),
            ("context", "input", "Llamas live in the Andes."),
            ("instructions", "input", "Be brief."),
            ("history", "history", "Human: Hi"),
            ("chat_history", "history", turns("Hi", "Hello.")),
            ("messages", "prompt", turns("Hi", "Hello.", TEXTS[0])),
        )
    },
    "the conversation again beside the prompt": (
        ".jsonl",
        lines({"messages": turns(TEXTS[0], "A hat."), "prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        TEXTS,
    ),
    "an empty prompt, the question in another column": (
        ".jsonl",
        lines({"prompt": "", "question": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        ("missing_field", "prompt=question"),
    ),
    "a short prompt with which both answers begin": (
        ".jsonl",
        lines({"prompt": "The film", "chosen": "The film was good", "rejected": "The film was bad"}),
        ("repeated", "'The film'"),
    ),
    "one side repeats the prompt": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": f"{TEXTS[0]} {TEXTS[1]}", "rejected": TEXTS[2]}),
        ("prompt_mismatch", "one side repeats"),
    ),
    "a short dialogue as prompt and in both sides": (
        ".jsonl",
        lines({"prompt": ASK, "chosen": f"{ASK} An animal.", "rejected": f"{ASK} A car."}),
        (ASK, " An animal.", " A car."),
    ),
    "two system messages in the prompt column": (
        ".jsonl",
        lines({"prompt": [*turns("Be brief.", "Be kind.", roles=("system",)), *PROMPT], **ANSWERS}),
        ([("system", "Be brief."), ("system", "Be kind."), *ASKED[0]], *ASKED[1:]),
    ),
    "answers that differ in the space around them": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": "An animal.", "rejected": " An animal.\n"}),
        ("equal", "An animal."),
    ),
    "answers that differ in how an accent is written": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": "caf\u00e9", "rejected": "cafe\u0301"}),
        ("equal", "caf"),
    ),
    "a margin below 0": (
        ".jsonl",
        lines({"prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2], "margin": -1}),
        ("wrong_type", "rejected is better"),
    ),
    "a turn that was never answered": (
        ".csv",
        'prompt,response_a,response_b,winner_model_a,winner_model_b\n"[""Hi""]","[null]","[""Hello.""]",0,1\n',
        ("empty", "response_a"),
    ),
    "both sides won": (
        ".csv",
        'prompt,response_a,response_b,winner_model_a,winner_model_b\n"[""Hi""]","[""a""]","[""b""]",1,1\n',
        ("wrong_type", "both 1"),
    ),
    "a tree without its first message": (
        ".jsonl",
        lines(TREE | {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Fur.", "rank": 0}),
        ("missing_field", "lacks messages"),
    ),
    "messages of an unknown role beside the prompt": (
        ".jsonl",
        lines(
            {
                "conversations": turns("Hi", roles=("alice",)),
                "prompt": TEXTS[0],
                **dict(zip(SIDES, TEXTS[1:], strict=True)),
            }
        ),
        ("unread", "prompt=conversations"),
    ),
    "OpenAssistant from pandas: NaN for null": (
        ".jsonl",
        lines(
            TREE
            | {
                "message_id": "1",
                "parent_id": float("nan"),
                "role": "prompter",
                "text": TEXTS[0],
                "rank": float("nan"),
            },
            TREE | {"message_id": "2", "parent_id": "1", "role": "assistant", "text": TEXTS[2], "rank": 1.0},
            TREE | {"message_id": "3", "parent_id": "1", "role": "assistant", "text": TEXTS[1], "rank": 0.0},
        ),
        ASKED,
    ),
}
