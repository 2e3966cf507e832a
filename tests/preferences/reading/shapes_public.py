"""A row or two of public preference sets, in their exact shape (columns and types; texts are ours), and the pair that
must come out, written down by hand. A pair is (prompt, chosen, rejected); a conversation is a list of (role, text)."""

import json


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def turns(*texts, roles=("user", "assistant"), names=("role", "content")):
    """Messages that take turns."""
    return [{names[0]: roles[n % len(roles)], names[1]: text} for n, text in enumerate(texts)]


HELLO = turns("What is a llama?", "An animal."), turns("What is a llama?", "A car.")
ASKED = ([("user", "What is a llama?")], [("assistant", "An animal.")], [("assistant", "A car.")])
TEXTS = ("What is a llama?", "An animal.", "A car.")
RATED = {"prompt": "What is a llama?", "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
TREE = {"message_tree_id": "1", "tree_state": "ready_for_export", "lang": "en", "deleted": False}

# name -> (file ending, content, format, pair, further numbers)
PUBLIC = {
    "Anthropic/hh-rlhf": (
        ".jsonl",
        lines(
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is a llama?\n\nAssistant: An animal.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is a llama?\n\nAssistant: A car.",
            }
        ),
        "hh",
        ([("user", "Hi"), ("assistant", "Hello."), ("user", "What is a llama?")], *ASKED[1:]),
        {},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        ".jsonl",
        lines(
            {
                "prompt": "What is a llama?",
                "prompt_id": "ab" * 32,
                "chosen": HELLO[0],
                "rejected": HELLO[1],
                "messages": HELLO[0],
                "score_chosen": 8.0,
                "score_rejected": 3.5,
            }
        ),
        "pairs",
        ASKED,
        {"chosen_score": 8.0, "rejected_score": 3.5},
    ),
    "openbmb/UltraFeedback": (
        ".jsonl",
        lines(
            {
                "source": "evol_instruct",
                "instruction": "What is a llama?",
                "models": ["alpaca-7b", "gpt-4", "bard"],
                "completions": [
                    {"annotations": {}, "model": "alpaca-7b", "response": "A kind of fur.", "overall_score": 5.0},
                    {"annotations": {}, "model": "gpt-4", "response": "An animal.", "overall_score": 8.5},
                    {"annotations": {}, "model": "bard", "response": "A car.", "overall_score": 2.0},
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        ),
        "ultrafeedback_raw",
        TEXTS,
        {"chosen_score": 8.5, "rejected_score": 2.0},
    ),
    "stanfordnlp/SHP": (
        ".jsonl",
        lines(
            {
                "post_id": "qt3nxl",
                "domain": "askculinary_train",
                "upvote_ratio": 0.98,
                "history": "What is a llama?",
                "c_root_id_A": "a",
                "c_root_id_B": "b",
                "score_A": 10,
                "score_B": 30,
                "human_ref_A": "A car.",
                "human_ref_B": "An animal.",
                "labels": 0,
                "seconds_difference": 10.0,
                "score_ratio": 3.0,
            }
        ),
        "shp",
        TEXTS,
        {"chosen_score": 30.0, "rejected_score": 10.0},
    ),
    "berkeley-nest/Nectar": (
        ".jsonl",
        lines(
            {
                "prompt": "\n\nHuman: What is a llama?\n\nAssistant: ",
                "answers": [
                    {"answer": "A car.", "model": "llama-2-7b-chat", "rank": 7.0},
                    {"answer": "An animal.", "model": "gpt-4", "rank": 1.0},
                    {"answer": "Fur.", "model": "mistral", "rank": 2.0},
                ],
                "turns": 1,
                "num_responses": 3,
                "source": ["sharegpt"],
                "good_natured": True,
            }
        ),
        "nectar",
        ASKED,
        {},
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        ".jsonl",
        lines(
            {
                "prompt": "What is a llama?",
                "response_0": "A car.",
                "response_1": "An animal.",
                "is_response_0_safe": True,
                "is_response_1_safe": True,
                "response_0_harm_category": {"Privacy Violation": False},
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ),
        "safe_rlhf",
        TEXTS,
        {},
    ),
    "nvidia/HelpSteer2 (preference)": (
        ".jsonl",
        lines(
            {
                "split": "train",
                "prompt": "What is a llama?",
                "response_1": "A car.",
                "response_2": "An animal.",
                "preference_strength": 2,
                "preference_statement": "Response 2 is better.",
                "preference_elaboration": "...",
                "three_most_similar_preferences": [],
                "all_preferences_unprocessed": [],
            }
        ),
        "helpsteer",
        ASKED,
        {"margin": 2.0},
    ),
    "nvidia/HelpSteer3": (
        ".jsonl",
        lines(
            {
                "domain": "general",
                "language": "english",
                "context": turns("Hi", "Hello.", "What is a llama?"),
                "response1": "An animal.",
                "response2": "A car.",
                "overall_preference": -3,
                "individual_preference": [{"score": -3, "reasoning": "...", "feedback1": "...", "feedback2": "..."}],
            }
        ),
        "helpsteer",
        ([("user", "Hi"), ("assistant", "Hello."), ("user", "What is a llama?")], *ASKED[1:]),
        {"margin": 3.0},
    ),
    "openai/summarize_from_feedback (comparisons)": (
        ".jsonl",
        lines(
            {
                "info": {
                    "id": "t3_1",
                    "post": "It spits.",
                    "title": "My llama",
                    "subreddit": "pets",
                    "site": None,
                    "article": None,
                },
                "summaries": [
                    {"text": " cars", "policy": "sup1", "note": None},
                    {"text": " llama spits", "policy": "ref", "note": None},
                ],
                "choice": 1,
                "worker": "w",
                "batch": "batch3",
                "split": "train",
                "extra": {"confidence": 7},
            }
        ),
        "summarize",
        ("SUBREDDIT: r/pets\n\nTITLE: My llama\n\nPOST: It spits.\n\nTL;DR:", " llama spits", " cars"),
        {},
    ),
    "trl-lib/tldr-preference": (
        ".jsonl",
        lines({"prompt": "POST: It spits.\n\nTL;DR:", "chosen": " llama spits", "rejected": " cars"}),
        "pairs",
        ("POST: It spits.\n\nTL;DR:", " llama spits", " cars"),
        {},
    ),
    "openai/webgpt_comparisons": (
        ".jsonl",
        lines(
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": "What is a llama?"},
                "quotes_0": {"title": [], "extract": []},
                "answer_0": "A car.",
                "tokens_0": {"prefix": [], "completion": []},
                "score_0": -0.5,
                "quotes_1": {"title": [], "extract": []},
                "answer_1": "An animal.",
                "tokens_1": {"prefix": [], "completion": []},
                "score_1": 0.5,
            }
        ),
        "webgpt",
        TEXTS,
        {"chosen_score": 0.5, "rejected_score": -0.5},
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        ".jsonl",
        lines(
            {"id": "x", "prompt": "What is a llama?", "source": "wildchat", "chosen": HELLO[0], "rejected": HELLO[1]}
        ),
        "pairs",
        ASKED,
        {},
    ),
    "Intel/orca_dpo_pairs": (
        ".jsonl",
        lines({"system": "Be brief.", "question": "What is a llama?", "chosen": "An animal.", "rejected": "A car."}),
        "orca",
        ([("system", "Be brief."), ("user", "What is a llama?")], *ASKED[1:]),
        {},
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        ".jsonl",
        lines(
            {
                "system": "",
                "input": "What is a llama?",
                "chosen": "An animal.",
                "rejected": "A car.",
                "generations": ["An animal.", "A car."],
                "order": ["chosen", "rejected"],
                "labelling_model": "gpt-4-1106-preview",
                "rating": [9.0, 2.0],
                "status": "unchanged",
                "original_chosen": "An animal.",
                "original_rejected": "A car.",
                "chosen_score": 9.0,
                "in_gsm8k_train": False,
            }
        ),
        "orca",
        ASKED,
        {"chosen_score": 9.0},
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        ".jsonl",
        lines(
            {
                "source": "Dove",
                "conversation": [{"input": "Hi", "output": "Hello."}, {"input": "What is a llama?", "output": "?"}],
                "original_response": "?",
                "generation_prompt": ["Hi", "What is a llama?"],
                "prompt": "What is a llama?",
                "chosen": turns("Hi", "Hello.", "What is a llama?", "An animal."),
                "rejected": turns("Hi", "Hello.", "What is a llama?", "A car."),
                "rating_chosen": 5,
                "rating_rejected": 2,
                "chosen_model": "Capybara",
            }
        ),
        "pairs",
        ([("user", "Hi"), ("assistant", "Hello."), ("user", "What is a llama?")], *ASKED[1:]),
        {"chosen_score": 5.0, "rejected_score": 2.0},
    ),
    "argilla/dpo-mix-7k": (
        ".jsonl",
        lines(
            {
                "dataset": "argilla/ultrafeedback",
                "chosen": [{"role": "system", "content": "Be brief."}, *HELLO[0]],
                "rejected": [{"role": "system", "content": "Be brief."}, *HELLO[1]],
                "chosen_rating": 5.0,
                "rejected_rating": 3.0,
            }
        ),
        "pairs",
        ([("system", "Be brief."), ("user", "What is a llama?")], *ASKED[1:]),
        {"chosen_score": 5.0, "rejected_score": 3.0},
    ),
    "Skywork/Skywork-Reward-Preference-80K": (
        ".jsonl",
        lines({"chosen": HELLO[0], "rejected": HELLO[1], "source": "magpie_pro_llama3.1"}),
        "pairs",
        ASKED,
        {},
    ),
    "tasksource/oasst1_pairwise_rlhf_reward": (
        ".jsonl",
        lines({"lang": "en", "parent_id": "p", "prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]}),
        "pairs",
        TEXTS,
        {},
    ),
    "IMDb pairs (Rafailov et al. 2023)": (
        ".jsonl",
        lines({"prompt": "This film", "chosen": " is a joy.", "rejected": " is a bore."}),
        "pairs",
        ("This film", " is a joy.", " is a bore."),
        {},
    ),
    "openbmb/UltraInteract_pair": (
        ".jsonl",
        lines(
            {
                "task": "Coding",
                "dataset": "codecontest",
                "trajectory": turns("What is a llama?", names=("from", "value")),
                "chosen": "An animal.",
                "rejected": "A car.",
                "id": "0",
                "parent_id": "1",
            }
        ),
        "pairs",
        ASKED,
        {},
    ),
    "allenai/reward-bench-2": (
        ".jsonl",
        lines(
            {
                "id": "0",
                "prompt": "What is a llama?",
                "chosen": ["An animal."],
                "rejected": ["A car.", "A hat.", "A town."],
                "num_correct": 1,
                "num_incorrect": 3,
                "total_completions": 4,
                "models": ["a", "b", "c", "d"],
                "subset": "Factuality",
                "additional_metadata": None,
            }
        ),
        "reward_bench_2",
        TEXTS,
        {},
    ),
    "allenai/reward-bench": (
        ".jsonl",
        lines(
            {
                "prompt": "What is a llama?",
                "chosen": "An animal.",
                "chosen_model": "a",
                "rejected": "A car.",
                "rejected_model": "b",
                "subset": "alpacaeval-easy",
                "id": 0,
            }
        ),
        "pairs",
        TEXTS,
        {},
    ),
    "lmsys/chatbot_arena_conversations": (
        ".jsonl",
        lines(
            {
                "question_id": "q",
                "model_a": "x",
                "model_b": "y",
                "winner": "model_b",
                "judge": "arena_user",
                "conversation_a": HELLO[1],
                "conversation_b": HELLO[0],
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 1.0,
            },
            {"model_a": "x", "model_b": "y", "winner": "tie (bothbad)", "conversation_a": [], "conversation_b": []},
        ),
        "arena",
        ASKED,
        {},
    ),
    "lmarena-ai/arena-human-preference-55k": (
        ".csv",
        "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '1,x,y,"[""What is a llama?""]","[""An animal.""]","[""A car.""]",1,0,0\n',
        "arena",
        ASKED,
        {},
    ),
    "lmarena-ai/arena-human-preference-140k": (
        ".jsonl",
        lines(
            {
                "id": "0",
                "model_a": "x",
                "model_b": "y",
                "winner": "model_a",
                "conversation_a": [
                    {"role": m["role"], "content": [{"type": "text", "text": m["content"], "image": None}]}
                    for m in HELLO[0]
                ],
                "conversation_b": [
                    {"role": m["role"], "content": [{"type": "text", "text": m["content"], "image": None}]}
                    for m in HELLO[1]
                ],
            }
        ),
        "arena",
        ASKED,
        {},
    ),
    "lvwerra/stack-exchange-paired": (
        ".jsonl",
        lines(
            {
                "qid": 1,
                "question": "What is a llama?",
                "date": "2011/07/01",
                "metadata": ["https://..."],
                "response_j": "An animal.",
                "response_k": "A car.",
            }
        ),
        "stack_exchange",
        TEXTS,
        {},
    ),
    "LLaMA-Factory, sharegpt ranking": (
        ".json",
        json.dumps(
            [
                {
                    "conversations": turns("What is a llama?", roles=("human", "gpt"), names=("from", "value")),
                    "chosen": {"from": "gpt", "value": "An animal."},
                    "rejected": {"from": "gpt", "value": "A car."},
                }
            ]
        ),
        "pairs",
        ASKED,
        {},
    ),
    "LLaMA-Factory, alpaca ranking": (
        ".json",
        json.dumps(
            [
                {
                    "instruction": "What is this?",
                    "input": "A llama.",
                    "chosen": "An animal.",
                    "rejected": "A car.",
                    "system": "Be brief.",
                    "history": [["Hi", "Hello."]],
                }
            ]
        ),
        "llama_factory",
        (
            [
                ("system", "Be brief."),
                ("user", "Hi"),
                ("assistant", "Hello."),
                ("user", "What is this?\nA llama."),
            ],
            *ASKED[1:],
        ),
        {},
    ),
    "OpenAI preference fine-tuning": (
        ".jsonl",
        lines(
            {
                "input": {"messages": HELLO[0][:1], "tools": [], "parallel_tool_calls": True},
                "preferred_output": HELLO[0][1:],
                "non_preferred_output": HELLO[1][1:],
            }
        ),
        "openai",
        ASKED,
        {},
    ),
    "nvidia/HelpSteer2 (ratings; answers to one prompt need not stand together)": (
        ".jsonl",
        lines(
            RATED | {"response": "A car.", "helpfulness": 1},
            RATED | {"prompt": "Name a river.", "response": "The Rhine.", "helpfulness": 4},
            RATED | {"response": "An animal.", "helpfulness": 4},
        ),
        "rated",
        ASKED,
        {"chosen_score": 4.0, "rejected_score": 1.0, "margin": 3.0},
    ),
    "nvidia/HelpSteer2 (several turns in one text)": (
        ".jsonl",
        lines(
            {
                "prompt": "Hi<extra_id_1>Assistant\nHello.<extra_id_1>User\nWhat is a llama?",
                "response_1": "An animal.",
                "response_2": "A car.",
                "preference_strength": -1,
            }
        ),
        "helpsteer",
        ([("user", "Hi"), ("assistant", "Hello."), ("user", "What is a llama?")], *ASKED[1:]),
        {"margin": 1.0},
    ),
    "OpenAssistant/oasst1 (messages)": (
        ".jsonl",
        lines(
            TREE
            | {"message_id": "1", "parent_id": None, "role": "prompter", "text": "What is a llama?", "rank": None},
            TREE | {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Fur.", "rank": 1},
            TREE | {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "A car.", "rank": 2},
            TREE | {"message_id": "4", "parent_id": "1", "role": "assistant", "text": "An animal.", "rank": 0},
            TREE | {"message_id": "5", "parent_id": "1", "role": "assistant", "text": "?", "rank": 9, "deleted": True},
            TREE | {"message_id": "6", "parent_id": "4", "role": "prompter", "text": "Thanks", "rank": 0},
        ),
        "oasst",
        ASKED,
        {},
    ),
    "OpenAssistant (trees)": (
        ".jsonl",
        lines(
            {
                "message_tree_id": "1",
                "tree_state": "ready_for_export",
                "prompt": {
                    "role": "prompter",
                    "text": "Hi",
                    "replies": [
                        {
                            "role": "assistant",
                            "text": "Hello.",
                            "rank": None,
                            "replies": [
                                {
                                    "role": "prompter",
                                    "text": "What is a llama?",
                                    "replies": [
                                        {"role": "assistant", "text": "An animal.", "rank": 0, "replies": []},
                                        {"role": "assistant", "text": "A car.", "rank": 1, "replies": []},
                                    ],
                                }
                            ],
                        }
                    ],
                },
            }
        ),
        "oasst_trees",
        ([("user", "Hi"), ("assistant", "Hello."), ("user", "What is a llama?")], *ASKED[1:]),
        {},
    ),
    "HuggingFaceH4/stack-exchange-preferences": (
        ".jsonl",
        lines(
            {
                "qid": 1,
                "question": "What is a llama?",
                "answers": [
                    {"answer_id": 1, "author": "a", "pm_score": 0, "selected": False, "text": "A car."},
                    {"answer_id": 2, "author": "b", "pm_score": 3, "selected": True, "text": "An animal."},
                ],
                "date": "2011/07/01",
                "metadata": ["https://..."],
            }
        ),
        "stack_exchange_votes",
        TEXTS,
        {"chosen_score": 3.0, "rejected_score": 0.0},
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        ".jsonl",
        lines(
            {
                "source": "evol_instruct",
                "instruction": "What is a llama?",
                "chosen_response": "An animal.",
                "rejected_response": "A car.",
                "chosen_avg_rating": 5.0,
                "rejected_avg_rating": 2.0,
                "chosen_model": "a",
            }
        ),
        "argilla",
        TEXTS,
        {"chosen_score": 5.0, "rejected_score": 2.0},
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        ".jsonl",
        lines(
            {
                "source": "evol_instruct",
                "prompt": "What is a llama?",
                "chosen": HELLO[0],
                "chosen-rating": 5.0,
                "chosen-model": "a",
                "rejected": HELLO[1],
                "rejected-rating": 2.0,
                "rejected-model": "b",
            }
        ),
        "pairs",
        ASKED,
        {"chosen_score": 5.0, "rejected_score": 2.0},
    ),
    "llm-blender/Unified-Feedback": (
        ".jsonl",
        lines({"id": "1", "conv_A": HELLO[1], "conv_B": HELLO[0], "conv_A_rating": 1.0, "conv_B_rating": 4.0}),
        "unified_feedback",
        ASKED,
        {"chosen_score": 4.0, "rejected_score": 1.0},
    ),
    "lmsys/mt_bench_human_judgments (a vote on the first turn)": (
        ".jsonl",
        lines(
            {
                "question_id": 1,
                "winner": "model_b",
                "conversation_a": [*HELLO[1], *turns("And?", "Red.")],
                "conversation_b": [*HELLO[0], *turns("And?", "It spits.")],
                "turn": 1,
            }
        ),
        "arena",
        ASKED,
        {},
    ),
    "lmarena-ai/arena-human-preference-55k (the second wins; 0 is text in a CSV)": (
        ".csv",
        "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '1,x,y,"[""What is a llama?""]","[""A car.""]","[""An animal.""]",0,1,0\n',
        "arena",
        ASKED,
        {},
    ),
    "stanfordnlp/SHP (CSV)": (
        ".csv",
        "history,human_ref_A,human_ref_B,labels,score_A,score_B,score_ratio\n"
        "What is a llama?,A car.,An animal.,0,1,5,5.0\n",
        "shp",
        TEXTS,
        {"chosen_score": 5.0, "rejected_score": 1.0},
    ),
    "PKU-Alignment/PKU-SafeRLHF (pandas: whole numbers as floats)": (
        ".jsonl",
        lines(
            {
                "prompt": "What is a llama?",
                "response_0": "A car.",
                "response_1": "An animal.",
                "is_response_0_safe": True,
                "is_response_1_safe": True,
                "better_response_id": 1.0,
                "safer_response_id": 0.0,
            }
        ),
        "safe_rlhf",
        TEXTS,
        {},
    ),
    "HuggingFaceH4/orca_dpo_pairs (conversations and a system column)": (
        ".jsonl",
        lines({"system": "Be brief.", "question": "What is a llama?", "chosen": HELLO[0], "rejected": HELLO[1]}),
        "orca",
        ([("system", "Be brief."), ("user", "What is a llama?")], *ASKED[1:]),
        {},
    ),
}
