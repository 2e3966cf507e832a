"""A completion's tokens are those of the text joined, whatever the tokenizer does with the start of a text."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ppo_vs_dpo.models.text.encoding import encode_prompts
from ppo_vs_dpo.models.text.prompts import (
    completion_ids,
    decode_completion,
    encode_completion,
    encode_prompt,
    own_start,
    puts_a_space_first,
)

CORPUS = [
    "the film was good and bright, not dull at all.",
    "a story of a cast that was very bad (and dull)",
    "Human: what is a llama?\n\nAssistant: an animal of the Andes.\n",
    "0 1 2 3 4 5 6 7 8 9 ) ( . , ; : ! ? - é 好 👍",
] * 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def trained(backend, normalizer=None, pre_tokenizer=None, decoder=None, alphabet=()):
    """A BPE tokenizer of the given kind, trained on a few lines, with BOS before every prompt."""
    tokenizer = Tokenizer(backend)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special[:5], initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template=TEMPLATE,
    )


def metaspace(scheme):
    return trained(
        models.BPE(unk_token="<unk>", fuse_unk=True),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
        alphabet="\n",
    )


def llama2():
    """Llama 2's own: a space is put before every text by the normalizer, and taken off again when decoding."""
    return trained(
        models.BPE(unk_token="<unk>", fuse_unk=True),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        alphabet="\n",
    )


def byte_level(add_prefix_space):
    return trained(
        models.BPE(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        decoder=decoders.ByteLevel(),
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


SPACED = {
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "llama 2": llama2,
    "byte-level with a space": lambda: byte_level(True),
}
PLAIN = {"metaspace never": lambda: metaspace("never"), "byte-level": lambda: byte_level(False)}
PROMPT = "the film was"
COMPLETIONS = [" good and bright.", ".", ", not dull", " (very bad)", "\n\nAssistant: an animal", " é 好 👍"]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [*SPACED, *PLAIN])
def test_prompt_and_completion_are_the_text_joined(kind):
    tokenizer = {**SPACED, **PLAIN}[kind]()
    assert puts_a_space_first(tokenizer) == (kind in SPACED)
    prompt = encode_prompt(tokenizer, PROMPT)
    for completion in COMPLETIONS:
        whole = tokenizer(PROMPT + completion)["input_ids"]
        if whole[: len(prompt)] != prompt:
            continue  # the tokenizer melts the two together: no prompt's tokens could stay what they are
        assert [*prompt, *encode_completion(tokenizer, completion, finished=False)] == whole, completion
    # The cases above are not all skipped.
    assert sum(tokenizer(PROMPT + c)["input_ids"][: len(prompt)] == prompt for c in COMPLETIONS) >= 3


@pytest.mark.parametrize("kind", SPACED)
def test_alone_they_would_differ(kind):
    """Why this is needed: a completion on its own gets a space that the text does not have."""
    tokenizer = SPACED[kind]()
    alone = tokenizer(".", add_special_tokens=False)["input_ids"]
    assert encode_completion(tokenizer, ".", finished=False) != alone


@pytest.mark.parametrize("kind", [*SPACED, *PLAIN])
def test_decoding_and_encoding_again_gives_the_same_tokens(kind):
    """What a policy samples is shown and scored as text: the space that its first token begins with is kept."""
    tokenizer = {**SPACED, **PLAIN}[kind]()
    for completion in COMPLETIONS[:4]:
        ids = encode_completion(tokenizer, completion)
        assert decode_completion(tokenizer, ids) == completion
        assert encode_completion(tokenizer, decode_completion(tokenizer, ids)) == ids


@pytest.mark.parametrize("kind", [*SPACED, *PLAIN])
def test_answers_in_a_conversation_are_the_text_joined(kind):
    tokenizer = {**SPACED, **PLAIN}[kind]()
    prompt = [{"role": "user", "content": PROMPT}]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    head = encode_prompt(tokenizer, prompt)
    for text in ("good and bright.", "an animal", "(very bad)"):
        answer = [{"role": "assistant", "content": text}]
        whole = tokenizer(rendered + text, add_special_tokens=False)["input_ids"]
        assert whole[: len(head)] == head
        assert [*head, *encode_completion(tokenizer, answer, finished=False)] == whole


def test_tokenizers_that_add_nothing_are_asked_once_and_as_before(word_tokenizer):
    """Those of the testbed and of byte-level BPE: bit for bit what the tokenizer says of the completion alone."""
    from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer

    texts = [" good", "bad and dull", "", " the acting was superb."]
    for tokenizer in (word_tokenizer, build_tokenizer(), byte_level(False)):
        alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert completion_ids(tokenizer, texts) == alone
        assert not puts_a_space_first(tokenizer)
        for ids in alone:
            plain = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert decode_completion(tokenizer, ids) == plain


def test_texts_that_melt_into_a_mark_get_another():
    """With a merge of line break and "t", the first mark does not stand alone before "the"; the second does."""
    tokenizer = metaspace("first")
    backend = tokenizer.backend_tokenizer
    import json

    rules = json.loads(backend.to_str())
    rules["model"]["vocab"]["\nt"] = len(rules["model"]["vocab"])
    rules["model"]["merges"].insert(0, ["\n", "t"])
    melting = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    assert melting.tokenize("\nthe")[1] != "\n"
    prompt = encode_prompt(melting, "(")
    assert [*prompt, *encode_completion(melting, "the film", False)] == melting("(the film")["input_ids"]


@pytest.mark.parametrize("kind", [*SPACED, *PLAIN])
def test_a_rendered_prompt_is_read_as_the_conversation_it_was_made_of(kind):
    """As in many scripts: the template's text is the prompt. It has the template's BOS; there is no second one."""
    tokenizer = {**SPACED, **PLAIN}[kind]()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    conversation = [{"role": "user", "content": PROMPT}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    ids = encode_prompt(tokenizer, conversation)
    assert encode_prompt(tokenizer, rendered) == ids
    assert encode_prompts(tokenizer, [PROMPT, rendered]) == [encode_prompt(tokenizer, PROMPT), ids]
    assert ids.count(tokenizer.bos_token_id) == 1
    # Text without marks gets the tokenizer's own BOS, as before.
    assert encode_prompt(tokenizer, PROMPT)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", [*SPACED, *PLAIN])
def test_an_end_mark_in_an_answer_is_the_end_and_not_a_second_one(kind):
    tokenizer = {**SPACED, **PLAIN}[kind]()
    for completion in COMPLETIONS:
        plain = encode_completion(tokenizer, completion)
        for carried in ("</s>", "</s>\n", "</s></s>", " </s> "):
            if carried[0] != " ":
                assert encode_completion(tokenizer, completion + carried) == plain
            assert encode_completion(tokenizer, completion + carried).count(tokenizer.eos_token_id) == 1
        assert encode_completion(tokenizer, completion + "</s>", finished=False) == plain[:-1]


def test_every_special_token_in_front_counts_not_bos_alone():
    tokenizer = byte_level(False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <|user|> $A",
        special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "<|user|>")],
    )
    assert own_start(tokenizer) == tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
    assert encode_prompt(tokenizer, f"<s><|user|>{PROMPT}") == encode_prompt(tokenizer, PROMPT)
    tokenizer.backend_tokenizer.post_processor = None
    assert own_start(tokenizer) == []
    assert encode_prompt(tokenizer, f"<s>{PROMPT}").count(tokenizer.bos_token_id) == 1
