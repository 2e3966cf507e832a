"""Batches are encoded as single prompts and completions are; what does not fit is named."""

import multiprocessing
import time

import pyarrow as pa
import pytest
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.models.text import encoding
from ppo_vs_dpo.models.text.encoding import (
    drop_long,
    encode_completions,
    encode_pair_file,
    encode_pairs,
    encode_prompts,
)
from ppo_vs_dpo.models.text.prompts import encode_completion, encode_prompt

PROMPTS = ["the film was", "a story", "bad"]
ANSWERS = [" good", " very dull and bad", ""]


def chat(texts, role):
    return [[{"role": role, "content": text}] for text in texts]


def test_texts(word_tokenizer):
    assert encode_prompts(word_tokenizer, PROMPTS) == [encode_prompt(word_tokenizer, p) for p in PROMPTS]
    expected = [encode_completion(word_tokenizer, a, f) for a, f in zip(ANSWERS, (True, False, True), strict=True)]
    assert encode_completions(word_tokenizer, ANSWERS, [True, False, True]) == expected
    assert encode_completions(word_tokenizer, ANSWERS)[2] == [word_tokenizer.eos_token_id]
    assert encode_prompts(word_tokenizer, []) == encode_completions(word_tokenizer, []) == []


def test_conversations_end_at_eos_not_after_it(word_tokenizer):
    """The template puts nothing after the answer here, but many put a line break there; it is never part of a row."""
    prompts, answers = chat(PROMPTS, "user"), chat(ANSWERS, "assistant")
    assert encode_prompts(word_tokenizer, prompts) == [encode_prompt(word_tokenizer, p) for p in prompts]
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": answers[::-1], "pair_id": [1, 2, 3]})
    encoded = encode_pairs(word_tokenizer, pairs)
    assert encoded["pair_id"][:] == [1, 2, 3]
    for row in encoded:
        assert row["prompt_ids"][-1] == word_tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == word_tokenizer.eos_token_id
    sizes = [len(word_tokenizer(a, add_special_tokens=False)["input_ids"]) + 1 for a in ANSWERS]
    longer = [max(a, b) for a, b in zip(sizes, sizes[::-1], strict=True)]
    assert encoded["length"][:] == [len(p) + n for p, n in zip(encoded["prompt_ids"], longer, strict=True)]


def test_an_empty_prompt_is_named(word_tokenizer):
    with pytest.raises(UserError, match="row 1: an empty prompt"):
        encode_prompts(word_tokenizer, ["the", "", "a"])


def test_a_tokenizer_that_ends_every_text(word_tokenizer):
    """A prompt must not end: the end-of-sequence token that some tokenizers append is taken off."""
    import copy

    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(word_tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending("the film")["input_ids"][-1] == 2
    assert encode_prompts(ending, PROMPTS) == encode_prompts(word_tokenizer, PROMPTS)
    assert encode_completions(ending, ANSWERS) == encode_completions(word_tokenizer, ANSWERS)


def test_long_rows():
    rows = Dataset.from_dict({"pair_id": ["a", "b", "c"]})
    assert drop_long(rows, [3, 9, 4], 5, 8, "dpo")["pair_id"][:] == ["a", "c"]
    assert drop_long(rows, [3, 9, 4], None, None, "dpo") is rows
    with pytest.raises(UserError, match=r"dpo: row b has 9 tokens and the model takes 8. Set dpo.max_length=8"):
        drop_long(rows, [3, 9, 4], None, 8, "dpo")
    with pytest.raises(UserError, match=r"dpo.max_length is 2 tokens and the shortest of 3 rows has 3"):
        drop_long(rows, [3, 9, 4], 2, 8, "dpo")


def pair_file(folder, n=2500):
    """A Parquet file of more than two chunks."""
    texts = [["the film was", "a story", "the cast"][i % 3] for i in range(n)]
    rows = {
        "prompt": texts,
        "chosen": [" good" + " and bright" * (i % 4) for i in range(n)],
        "rejected": [" bad" + " dull" * (i % 5) for i in range(n)],
        "pair_id": [f"p{i}" for i in range(n)],
        "soft_label": [None if i % 2 else 0.75 for i in range(n)],
    }
    write_parquet(folder / "pairs.parquet", rows)
    return folder / "pairs.parquet", Dataset.from_dict(rows)


def test_a_file_is_encoded_as_a_data_set_in_memory_is(word_tokenizer, tmp_path):
    path, rows = pair_file(tmp_path)
    found = encode_pair_file(word_tokenizer, path, tmp_path / "tokens")
    assert found.to_dict() == encode_pairs(word_tokenizer, rows).to_dict()
    assert found["prompt_ids"][:] == encode_prompts(word_tokenizer, rows["prompt"][:])
    assert found["rejected_ids"][:] == encode_completions(word_tokenizer, rows["rejected"][:])
    encoded = {"prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "length"}
    assert set(found.column_names) == encoded | {"pair_id", "soft_label"}
    assert found.cache_files  # on the disk, not in memory


def test_cached_tokens_that_are_not_todays_are_made_again(word_tokenizer, tmp_path):
    path, _ = pair_file(tmp_path, 5)
    found = encode_pair_file(word_tokenizer, path, tmp_path / "tokens")
    expected, features = found.to_dict(), found.features
    (cached,) = (tmp_path / "tokens").glob("*.arrow")
    cached.unlink()  # the old file stays mapped; another takes its name
    wrong = {**expected, "chosen_ids": [[*ids, word_tokenizer.eos_token_id] for ids in expected["chosen_ids"]]}
    table = Dataset.from_dict(wrong, features=features).data.table
    with pa.OSFile(str(cached), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    assert encode_pair_file(word_tokenizer, path, tmp_path / "tokens").to_dict() == expected
    # Cut, also where a chunk ends, where Arrow sees nothing wrong; emptied.
    whole = cached.read_bytes()
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table.slice(0, 3))
    fewer = out.getvalue().to_pybytes()
    for spoilt in (whole[: len(whole) // 2], fewer, b"", b"\xff" * 64):
        cached.unlink()
        cached.write_bytes(spoilt)
        assert encode_pair_file(word_tokenizer, path, tmp_path / "tokens").to_dict() == expected


def test_selected_rows_in_memory(word_tokenizer, tmp_path):
    """What was selected is encoded, in its order; nothing of nothing."""
    _, rows = pair_file(tmp_path, 50)
    encoded = encode_pairs(word_tokenizer, rows.select([40, 3, 7]))
    assert encoded["pair_id"][:] == ["p40", "p3", "p7"]
    assert encoded["prompt_ids"][:] == encode_prompts(word_tokenizer, [rows["prompt"][i] for i in (40, 3, 7)])
    assert len(encode_pairs(word_tokenizer, rows.select([]))) == 0


def test_token_ids_are_cached_by_content(word_tokenizer, tmp_path, monkeypatch):
    import copy
    import shutil

    from tokenizers.processors import TemplateProcessing

    path, _ = pair_file(tmp_path)
    tokens = tmp_path / "tokens"
    first = encode_pair_file(word_tokenizer, path, tokens)
    word_tokenizer(["a", "the film"], padding=True)  # the state that a call leaves behind does not matter
    with monkeypatch.context() as patch:
        patch.setattr("ppo_vs_dpo.models.text.encoding._encoded_tables", None)  # whoever encodes all again fails
        moved = shutil.copy(path, tmp_path / "moved.parquet")
        again = encode_pair_file(word_tokenizer, tmp_path / "moved.parquet", tokens)
        assert again["chosen_ids"][:] == first["chosen_ids"][:]
    assert len(list(tokens.iterdir())) == 1
    # Another tokenizer, or other pairs, are another content.
    starting = copy.deepcopy(word_tokenizer)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode_pair_file(starting, path, tokens)[0]["prompt_ids"][0] == 1
    write_parquet(moved, {"prompt": ["a"], "chosen": [" good"], "rejected": [" bad"]})
    assert len(encode_pair_file(word_tokenizer, tmp_path / "moved.parquet", tokens)) == 1
    assert len(list(tokens.iterdir())) == 3


def test_ranks_that_come_together_encode_once(word_tokenizer, tmp_path, monkeypatch):
    path, _ = pair_file(tmp_path, 30)
    theirs = encoding._encoded_tables

    def slowly(*args):
        with (tmp_path / "encoded").open("a") as out:
            out.write("once ")
        time.sleep(0.3)
        return theirs(*args)

    monkeypatch.setattr(encoding, "_encoded_tables", slowly)
    monkeypatch.setattr(encoding, "_first_agrees", lambda *_: True)
    processes = [
        multiprocessing.get_context("fork").Process(
            target=encode_pair_file, args=(word_tokenizer, path, tmp_path / "tokens")
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "encoded").read_text() == "once "


def test_a_broken_pair_file(word_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"none\.parquet does not exist"):
        encode_pair_file(word_tokenizer, tmp_path / "none.parquet", tmp_path)
    path, _ = pair_file(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"pairs\.parquet is not a complete Parquet file"):
        encode_pair_file(word_tokenizer, path, tmp_path)
    write_parquet(tmp_path / "two.parquet", {"prompt": ["a"], "chosen": [" good"]})
    with pytest.raises(UserError, match=r"has no column rejected; it has prompt, chosen"):
        encode_pair_file(word_tokenizer, tmp_path / "two.parquet", tmp_path)
    n = 1500
    rows = {"prompt": ["a"] * n, "chosen": [" good"] * n, "rejected": [" bad"] * n}
    rows["prompt"][1203] = ""
    write_parquet(tmp_path / "empty.parquet", rows)
    with pytest.raises(UserError, match=r"row 1203: an empty prompt"):
        encode_pair_file(word_tokenizer, tmp_path / "empty.parquet", tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())  # nothing half done is left


def test_more_pairs_take_no_more_memory(word_tokenizer, tmp_path):
    """The most that Python and Arrow hold at once: four times the pairs, the same few chunks."""
    import tracemalloc

    import pyarrow as pa

    highest = []
    for n in (3_000, 12_000):
        path, _ = pair_file(tmp_path, n)
        held = pa.total_allocated_bytes()
        tracemalloc.start()
        encoded = encode_pair_file(word_tokenizer, path, tmp_path / "tokens")
        highest.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(encoded) == n
        assert pa.total_allocated_bytes() - held < 1_000_000
    assert highest[1] < 1.3 * highest[0]
