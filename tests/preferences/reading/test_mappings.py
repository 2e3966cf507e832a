"""Each source's real shape, mapped to the schema."""

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.mappings import (
    MAPPINGS,
    FilteredError,
    MappingOptions,
    UnmappableError,
    detect,
    dialogue_text,
    map_row,
    mapping_named,
    parse_dialogue,
)


def mapped(row, **options):
    return map_row(row, MAPPINGS[detect(row)], MappingOptions(**options))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A pen?\n\nAssistant: Blue: yes.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A pen?\n\nAssistant: No.",
}


def test_hh_is_split_at_the_last_assistant_turn():
    assert mapped(HH) == {
        "prompt": [user("Hi"), assistant("Hello."), user("A pen?")],
        "chosen": [assistant("Blue: yes.")],
        "rejected": [assistant("No.")],
    }


def test_hh_as_plain_text_keeps_the_dialogue():
    pair = mapped(HH, conversational=False)
    assert pair["prompt"] + pair["chosen"] == HH["chosen"]
    assert pair["prompt"] + pair["rejected"] == HH["rejected"]


def test_hh_turns_of_one_speaker_are_joined_and_the_inverse_holds():
    messages = parse_dialogue("\n\nHuman: One\n\nHuman: Two\n\nAssistant: Three")
    assert messages == [user("One\n\nTwo"), assistant("Three")]
    assert parse_dialogue(dialogue_text(messages).removesuffix("\n\nAssistant:")) == messages


def test_hh_with_two_prompts_is_a_mismatch():
    with pytest.raises(UnmappableError) as error:
        mapped({**HH, "rejected": HH["rejected"].replace("pen", "pencil")})
    assert error.value.kind == "prompt_mismatch"


@pytest.mark.parametrize("text", ["\n\nHuman: Hi", "\n\nAssistant: Hi\n\nHuman: and then?"])
def test_hh_must_end_with_the_assistant(text):
    with pytest.raises(UnmappableError) as error:
        map_row({"chosen": text, "rejected": text}, MAPPINGS["hh"], MappingOptions())
    assert error.value.kind == "wrong_type"


def test_tldr_preprocessed_by_n_plus():
    """`vwxyzjn/summarize_from_feedback_oai_preprocessing_*`: no space after the query, sides with the end mark."""
    row = {
        "info": {"id": "t3_x", "post": "I ...", "title": "T", "subreddit": "r"},
        "summaries": [{"text": " one", "policy": "sup1"}, {"text": " two", "policy": "ref"}],
        "choice": 1,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "query": "SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: I ...\n\nTL;DR:",
        "chosen": " two<|endoftext|>",
        "rejected": " one<|endoftext|>",
        "policies": "ref--sup1",
    }
    labelling = {"batch": "batch3", "chosen_policy": "ref", "rejected_policy": "sup1"}
    assert mapped(row) == {"prompt": row["query"], "chosen": " two", "rejected": " one", **labelling}


def test_tldr_of_trl():
    row = {"prompt": "SUBREDDIT: r/r\n\nPOST: I ...\n\nTL;DR:", "chosen": " two", "rejected": " one"}
    assert mapped(row) == row


def test_ultrafeedback_binarized_repeats_the_prompt_in_both_conversations():
    row = {
        "prompt": "Why?",
        "prompt_id": "abc",
        "chosen": [user("Why?"), assistant("Because.")],
        "rejected": [user("Why?"), assistant("Dunno.")],
        "messages": [user("Why?"), assistant("Because.")],
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }
    assert mapped(row) == {
        "prompt": [user("Why?")],
        "chosen": [assistant("Because.")],
        "rejected": [assistant("Dunno.")],
        "chosen_score": 8.5,
        "rejected_score": 4.0,
    }


SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "What's the best way to disassemble raspberries?",
    "score_A": 340,
    "score_B": 166,
    "human_ref_A": "Pectinex, perhaps?",
    "human_ref_B": "Raspberry juice.",
    "labels": 1,
    "seconds_difference": 3238.0,
    "score_ratio": 2.05,
}


def test_shp_follows_the_label_and_the_ratio_filter():
    pair = mapped(SHP, min_score_ratio=2.0)
    assert (pair["chosen"], pair["rejected"]) == ("Pectinex, perhaps?", "Raspberry juice.")
    assert (pair["chosen_score"], pair["rejected_score"]) == (340, 166)
    assert mapped({**SHP, "labels": 0})["chosen"] == "Raspberry juice."
    with pytest.raises(FilteredError, match="score ratio below 3"):
        mapped(SHP, min_score_ratio=3.0)


SAFE = {
    "prompt": "How?",
    "response_0": "Zero.",
    "response_1": "One.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def test_safe_rlhf_has_two_preferences_and_two_filters():
    assert mapped(SAFE)["chosen"] == "One."
    assert mapped(SAFE, dimension="safe")["chosen"] == "Zero."
    assert mapped(SAFE, drop_both_safe=True, drop_both_unsafe=True)["chosen"] == "One."
    with pytest.raises(FilteredError, match="both responses safe"):
        mapped({**SAFE, "is_response_1_safe": True}, drop_both_safe=True)
    with pytest.raises(FilteredError, match="both responses unsafe"):
        mapped({**SAFE, "is_response_0_safe": False}, drop_both_unsafe=True)
    with pytest.raises(UserError, match=r"data\.dimension"):
        mapped(SAFE, dimension="kind")


def alpaca(preference):
    return {
        "instruction": "Name a pen.",
        "output_1": "Baseline.",
        "generator_1": "gpt4",
        "dataset": "helpful_base",
        "output_2": "Model.",
        "generator_2": "m",
        "annotator": "weighted",
        "preference": preference,
    }


def test_alpaca_eval_preference_is_the_weight_of_output_two():
    pair = mapped(alpaca(1.8))
    assert (pair["chosen"], pair["rejected"]) == ("Model.", "Baseline.")
    assert (pair["chosen_score"], pair["rejected_score"]) == pytest.approx((0.8, 0.2), abs=1e-12)
    assert mapped(alpaca(1.2))["chosen"] == "Baseline."
    assert mapped(alpaca(1.0))["rejected_score"] == 0
    for tie in (0, 1.5):
        with pytest.raises(FilteredError, match="tie"):
            mapped(alpaca(tie))
    with pytest.raises(UnmappableError, match="between 1 and 2"):
        mapped(alpaca(3))


def test_own_columns_and_messages_of_plain_text():
    row = {"question": "Q?", "better": " A.", "worse": " B.", "margin": "0.5"}
    options = {"columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}}
    assert mapped(row, **options) == {"prompt": "Q?", "chosen": " A.", "rejected": " B.", "margin": 0.5}
    assert mapped(row, **options, conversational=True) == {
        "prompt": [user("Q?")],
        "chosen": [assistant("A.")],
        "rejected": [assistant("B.")],
        "margin": 0.5,
    }
    with pytest.raises(UnmappableError, match=r"no better \(data\.columns\.chosen\); the row has question"):
        mapped({"question": "Q?"}, **options)


def test_a_prompt_is_what_the_sides_share_only_where_that_is_asked_for():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.raises(UnmappableError, match=r"no prompt.*data\.format=implicit"):
        mapped(row)
    implicit = MAPPINGS["implicit"]
    assert implicit(row, MappingOptions()) == {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    with pytest.raises(UnmappableError, match="share no beginning"):
        implicit({"chosen": "Yes.", "rejected": "No."}, MappingOptions())


def test_messages_with_plain_answers_and_messages_as_json_in_a_csv_field():
    row = {"prompt": [user("Q?")], "chosen": "A.", "rejected": "B."}
    expected = {"prompt": [user("Q?")], "chosen": [assistant("A.")], "rejected": [assistant("B.")]}
    assert mapped(row) == expected
    as_json = {
        "prompt": '[{"role": "user", "content": "Q?"}]',
        "chosen": '[{"role": "assistant", "content": "A."}]',
        "rejected": '[{"role": "assistant", "content": "B."}]',
    }
    assert mapped(as_json) == expected


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Q", "chosen": "A"}, "missing_field"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "missing_field"),
        ({"prompt": "Q", "chosen": "A", "rejected": 5}, "wrong_type"),
        ({"prompt": 7, "chosen": "A", "rejected": "B"}, "wrong_type"),
        ({"prompt": "Q", "chosen": "A", "rejected": [assistant("B")]}, "wrong_type"),
        ({"prompt": "Q", "chosen": [{"role": "user"}], "rejected": [assistant("B")]}, "wrong_type"),
        ({"prompt": "Q", "chosen": [], "rejected": [assistant("B")]}, "empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "much"}, "wrong_type"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "prompt_mismatch"),
    ],
)
def test_rows_that_cannot_be_mapped(row, kind):
    with pytest.raises(UnmappableError) as error:
        mapped(row)
    assert error.value.kind == kind


def test_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean ultrafeedback"):
        mapping_named("ultrafeedbak")
