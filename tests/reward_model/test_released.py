"""Reward models and policies in the forms in which papers released them score and load by their own convention.

Small stand-ins in the real shapes; with the Hub at hand the same line is `RewardScorer.load("cleanrl/...")`.
"""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading.heads import check_reward, load_reward
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer, load_value_or_reward
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from tests.architectures import tiny

QUERY = "the film was good and the plot was not dull"
SUMMARIES = [" good film", " very very dull", " bright cast and a good story"]


def of_trl(model, rows, pad):
    """``trl.get_reward`` (1.12): right padding, the score of the last token before the first padding token."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = ids != pad
    with torch.no_grad():
        states = model.base_model(input_ids=ids.masked_fill(~mask, 0), attention_mask=mask.long()).last_hidden_state
    scores = model.score(states).squeeze(-1)
    return [scores[number, len(row) - 1].item() for number, row in enumerate(rows)]


@pytest.fixture
def tldr_tokenizer(word_tokenizer):
    """As `cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr` has it: Pythia's, with a padding token that was added."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def neox(kind, tokenizer, **more):
    model = tiny("gpt_neox", kind, **more)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def test_reward_models_of_cleanrl_score_as_trl_reads_them(tldr_tokenizer, tmp_path):
    """`cleanrl/EleutherAI_pythia-{1b,2.8b,6.9b}-deduped__reward__tldr`, `mnoukhov/pythia410m-rm-tldr6.9b`."""
    model = neox(AutoModelForSequenceClassification, tldr_tokenizer, num_labels=1)
    model.save_pretrained(tmp_path)
    tldr_tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    rows = scorer.encode([QUERY] * 3, SUMMARIES)
    assert all(row[-1] == tldr_tokenizer.eos_token_id for row in rows)
    expected = of_trl(model, [list(row) for row in rows], tldr_tokenizer.pad_token_id)
    assert scorer.score([QUERY] * 3, SUMMARIES) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bias", [0.0, 1.25])
def test_scalar_models_of_n_plus_are_read_as_they_are(tldr_tokenizer, tmp_path, bias):
    """`vwxyzjn/...__reward__tldr`: ``scalar_head(lm_backbone(...)) - bias`` at the last token (Huang et al. 2024,
    details 11 and 15; released code, ``ScalarModel``)."""
    inner = neox(AutoModelForSequenceClassification, tldr_tokenizer, num_labels=1)
    torch.manual_seed(3)
    head, offset = torch.randn(1, inner.config.hidden_size), torch.tensor([0.5])
    weights = {f"lm_backbone.{key}": value for key, value in inner.base_model.state_dict().items()}
    save_file(
        {**weights, "scalar_head.weight": head, "scalar_head.bias": offset},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    size = inner.config.hidden_size
    outer = {"architectures": ["ScalarModel"], "base_model": "EleutherAI/pythia-1b-deduped", "hidden_size": size}
    write_json(tmp_path / "config.json", {**outer, "base_config": inner.config.to_dict(), "bias": bias})
    tldr_tokenizer.save_pretrained(tmp_path)
    check_reward(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    rows = scorer.encode([QUERY] * 3, SUMMARIES)
    with torch.no_grad():
        states = [inner.base_model(torch.tensor([list(row)])).last_hidden_state[0, -1] for row in rows]
    expected = [(head[0] @ state + offset[0] - bias).item() for state in states]
    assert max(expected) - min(expected) > 1e-2
    assert scorer.score([QUERY] * 3, SUMMARIES) == pytest.approx(expected, abs=1e-5)
    # What is saved from it is a plain folder that scores the same.
    scorer.model.save_pretrained(tmp_path / "plain")
    tldr_tokenizer.save_pretrained(tmp_path / "plain")
    again = RewardScorer.load(tmp_path / "plain")
    assert again.score([QUERY] * 3, SUMMARIES) == pytest.approx(expected, abs=1e-5)
    # A value model that starts from it has its backbone.
    value = load_value_or_reward(tmp_path, trainable=True)
    assert torch.equal(value.base_model.embed_in.weight, inner.base_model.embed_in.weight)


def test_a_scalar_model_without_its_head_or_a_layer_is_named(tldr_tokenizer, tmp_path):
    inner = neox(AutoModelForSequenceClassification, tldr_tokenizer, num_labels=1)
    weights = {f"lm_backbone.{key}": value for key, value in inner.base_model.state_dict().items()}
    write_json(tmp_path / "config.json", {"base_config": inner.config.to_dict(), "bias": 0.0})
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has no head scalar_head"):
        load_reward(tmp_path)
    layer = next(key for key in weights if key.endswith("dense.weight"))
    head = {"scalar_head.weight": torch.ones(1, inner.config.hidden_size), "scalar_head.bias": torch.zeros(1)}
    save_file(
        {k: v for k, v in weights.items() if k != layer} | head, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weights of the model"):
        load_reward(tmp_path)


@pytest.mark.parametrize("inner", [{"model_type": "nobody"}, {"model_type": "whisper"}, "EleutherAI/pythia-1b"])
def test_another_base_config_is_not_taken_for_a_scalar_model(word_tokenizer, tmp_path, inner):
    """A key of that name in a folder of transformers' own kind changes nothing."""
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "base_config": inner, "bias": 2.0})
    check_reward(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    rows = [list(row) for row in scorer.encode([QUERY] * 3, SUMMARIES)]
    assert scorer.score_sequences(rows) == pytest.approx(of_trl(model, rows, word_tokenizer.pad_token_id), abs=1e-5)


def test_reward_models_of_tulu_read_conversations_through_their_template(word_tokenizer, tmp_path):
    """`allenai/llama-3-tulu-2-8b-uf-mean-rm`, `allenai/Llama-3.1-Tulu-3-8B-RM`: one label, the policy's template."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
        "{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = [
        [{"role": "user", "content": QUERY}, {"role": "assistant", "content": text.strip()}] for text in SUMMARIES
    ]
    rows = [tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False) for turn in turns]
    expected = of_trl(model, rows, tokenizer.pad_token_id)
    scorer = RewardScorer.load(tmp_path)
    found = scorer.score([turn[:1] for turn in turns], [turn[1:] for turn in turns])
    assert found == pytest.approx(expected, abs=1e-5)


def test_policies_of_cleanrl_load_with_the_padding_token_that_was_added(tldr_tokenizer, tmp_path):
    model = neox(AutoModelForCausalLM, tldr_tokenizer)
    model.save_pretrained(tmp_path)
    tldr_tokenizer.save_pretrained(tmp_path)
    policy, tokenizer = load_policy(tmp_path), load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "[PAD]"
    assert policy.get_input_embeddings().num_embeddings == len(tokenizer)
    assert read_json(tmp_path / "config.json")["pad_token_id"] == tokenizer.pad_token_id
    ids = torch.tensor([tokenizer(QUERY)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, model(ids).logits)
