"""The testbed's tokenizer: one token a word, exact in both directions.

A token is ``" word"`` (with its leading space), ``"Word"`` (the first of a text) or a punctuation mark. A token
without a leading space starts with a capital letter or is punctuation, so *every* sequence of these tokens, also one
that a badly trained policy writes, is split again as it was: ``encode(decode(ids)) == ids``, and
``decode(encode(x)) == x`` for every text of the world.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ppo_vs_dpo.preferences.testbed.grammar import vocabulary

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the testbed's vocabulary.

    ``tokenizer(prompt)`` puts ``<s>`` in front; ``tokenizer(completion, add_special_tokens=False)`` adds nothing.
    ``<pad>``, ``<s>`` and ``</s>`` are three different tokens. Words outside the vocabulary become ``<unk>``.
    """
    words = {token: number for number, token in enumerate((PAD, BOS, EOS, UNK, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Z][a-z]*| ?[a-z]+|[.,]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
