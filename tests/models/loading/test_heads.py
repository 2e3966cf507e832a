"""Heads: none is drawn for scoring; those that other projects write are read by name, and named where they are not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading.heads import check_reward, load_reward, weights_of
from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from tests.architectures import tiny

ROWS = [[3, 9, 11, 2], [8, 7, 6, 5, 4, 3], [10, 2]]


@pytest.fixture
def causal(tmp_path, word_tokenizer):
    """A causal language model's folder, and the model."""
    model = tiny("llama", AutoModelForCausalLM)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture
def head():
    """A weight ``(1, 32)`` and a bias."""
    torch.manual_seed(5)
    return torch.randn(1, 32), torch.tensor([0.75])


def by_hand(model, weight, bias=0.0):
    """A linear head on the last state of each row."""
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    return [(weight[0] @ state).item() + float(bias) for state in states]


def add_to(folder, **tensors):
    """Further tensors in the folder's own weights, as a wrapper with a head saves them."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{k.replace("__", "."): v for k, v in tensors.items()}}, path, {"format": "pt"})


def test_a_language_model_cannot_score(causal):
    folder, _ = causal
    for seed in (0, 1):
        torch.manual_seed(seed)
        with pytest.raises(UserError, match=r"has no head to score with \(score.weight would be random\)") as raised:
            RewardScorer.load(folder)
    assert "causal language model" in str(raised.value)
    assert "no other head" in str(raised.value)
    # Where a head is trained one is drawn, as it was.
    torch.manual_seed(0)
    drawn = load_value_or_reward(folder, trainable=True)
    assert drawn.score.weight.detach().std() == pytest.approx(33**-0.5, rel=0.5)


@pytest.mark.parametrize("where", ["value_head.safetensors", "value_head.bin", "model.safetensors"])
def test_value_heads_of_trl_and_llama_factory(causal, head, where):
    folder, model = causal
    weight, bias = head
    tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    if where == "model.safetensors":
        add_to(folder, v_head__summary__weight=weight, v_head__summary__bias=bias)
    elif where.endswith("bin"):
        torch.save(tensors, folder / where)
    else:
        save_file(tensors, folder / where)
    with pytest.raises(UserError, match=r"It has v_head.summary.weight, as TRL and LLaMA-Factory write it: say head"):
        RewardScorer.load(folder)
    scorer = RewardScorer.load(folder, head="v_head")
    assert scorer.score_sequences(ROWS) == pytest.approx(by_hand(model, weight, bias), abs=1e-5)


@pytest.mark.parametrize("name", ["value_head", "score"])
@pytest.mark.parametrize("normalised", [False, True])
def test_heads_of_openrlhf(causal, head, name, normalised):
    folder, model = causal
    weight = head[0]
    add_to(folder, **{f"{name}__weight": weight})
    expected = by_hand(model, weight)
    if normalised:
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "normalize_reward": True, "mean": 1.5, "std": 2.5})
        expected = [(score - 1.5) / 2.5 for score in expected]
    if name == "value_head":
        with pytest.raises(UserError, match="as OpenRLHF write it: say head: value_head"):
            RewardScorer.load(folder)
    scorer = RewardScorer.load(folder, head=name if name == "value_head" else None)
    assert scorer.score_sequences(ROWS) == pytest.approx(expected, abs=1e-5)


def test_a_head_on_an_adapter(causal, head, tmp_path):
    """LLaMA-Factory's LoRA reward models: an adapter, and a value head beside it."""
    from peft import LoraConfig, get_peft_model

    folder, model = causal
    weight, bias = head
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for key, value in peft.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value)
    peft.peft_config["default"].base_model_name_or_path = str(folder)
    adapter = tmp_path / "adapter"
    peft.save_pretrained(adapter)
    with pytest.raises(UserError, match="has no head to score with"):
        load_reward(adapter)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, adapter / "value_head.safetensors")
    loaded = load_reward(adapter, head="v_head")
    merged = peft.merge_and_unload()
    with torch.no_grad():
        found = [loaded(torch.tensor([row])).logits.item() for row in ROWS]
    assert found == pytest.approx(by_hand(merged, weight, bias), abs=1e-5)


def test_sharded_weights_and_names(causal, head):
    folder, model = causal
    weight = head[0]
    tensors = {**load_file(folder / "model.safetensors"), "value_head.weight": weight}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / part, {"format": "pt"})
    mapping = {key: part for part, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    assert set(weights_of(str(folder))) == set(names)
    scorer = RewardScorer.load(folder, head="value_head")
    assert scorer.score_sequences(ROWS) == pytest.approx(by_hand(model, weight), abs=1e-5)
    for torn, why in ((b"{", "line 1: not valid JSON"), (b"[]", "no index of weights"), (b"\xff", "not UTF-8 text")):
        (folder / "model.safetensors.index.json").write_bytes(torn)
        with pytest.raises(UserError, match=f"index.json.*{why}"):
            weights_of(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "reward_head",
        "regression_layer",
        "rm_head",
        "score.summary",
        "classifier",
        "v_head.0",
        "base_model.score",
    ],
)
def test_a_head_of_any_name_is_named_and_loads_by_it(causal, head, name):
    """Whatever a folder calls its one output: the refusal says what to say, and saying it works."""
    folder, model = causal
    add_to(folder, **{f"{name.replace('.', '__')}__weight": head[0]})
    with pytest.raises(UserError, match="if that is it, say head: ") as raised:
        RewardScorer.load(folder)
    named = str(raised.value).split("say head: ")[1].split(". A head is drawn")[0]
    scorer = RewardScorer.load(folder, head=named)
    assert scorer.score_sequences(ROWS) == pytest.approx(by_hand(model, head[0]), abs=1e-5)


def test_a_bias_that_transformers_would_drop(causal, head, tmp_path, word_tokenizer):
    """LlamaForSequenceClassification has none; token classifiers (verl's value models) do, and it is a part of r."""
    folder, model = causal
    weight, bias = head
    add_to(folder, score__weight=weight, score__bias=bias)
    expected = by_hand(model, weight, bias)
    assert RewardScorer.load(folder).score_sequences(ROWS) == pytest.approx(expected, abs=1e-5)
    value = load_value_or_reward(folder, trainable=True)
    assert value.score.bias.requires_grad
    with torch.no_grad():
        assert [value(torch.tensor([row])).logits.item() for row in ROWS] == pytest.approx(expected, abs=1e-5)
    # Saved and loaded once more it is still there.
    value.save_pretrained(tmp_path / "again")
    word_tokenizer.save_pretrained(tmp_path / "again")
    assert RewardScorer.load(tmp_path / "again").score_sequences(ROWS) == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_a_reward(causal, head, tmp_path, word_tokenizer):
    folder, _ = causal
    with pytest.raises(UserError, match=r"has no head v_head. It has no other head either"):
        load_reward(folder, head="v_head")
    add_to(folder, value_head__weight=torch.randn(3, 32))
    with pytest.raises(UserError, match=r"the head value_head has the shape \(3, 32\)"):
        load_reward(folder, head="value_head")
    add_to(folder, value_head__weight=torch.randn(1, 16))
    with pytest.raises(UserError, match="takes 16 numbers, and the model gives 32"):
        load_reward(folder, head="value_head")
    labels = tmp_path / "labels"
    names = {0: "bad", 1: "good"}
    tiny("bert", AutoModelForSequenceClassification, id2label=names).save_pretrained(labels)
    with pytest.raises(UserError, match=r"has 2 labels \(bad, good\); a reward model has one"):
        RewardScorer.load(labels)
    # The config says nothing, the weights do.
    config = read_json(labels / "config.json")
    config.pop("id2label")
    config.pop("label2id", None)
    write_json(labels / "config.json", config)
    with pytest.raises(UserError, match=r"has a head with 2 labels \(classifier.weight\)"):
        load_reward(labels)
    short = tmp_path / "short"
    tiny("bert", AutoModelForSequenceClassification, num_labels=1).save_pretrained(short)
    weights = load_file(short / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "layer.1." not in key}
    save_file(kept, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 16 weights of the model that its config.json describes"):
        load_reward(short)


def test_what_is_known_before_anything_is_loaded(causal, head, tmp_path):
    """The check of a run's settings reads names of weights and the configuration alone."""
    from ppo_vs_dpo.pipeline.checking.inputs import judges, scores_of

    folder, _ = causal
    with pytest.raises(UserError, match="has no head to score with"):
        check_reward(folder)
    save_file({"v_head.summary.weight": head[0]}, folder / "value_head.safetensors")
    assert "say head: v_head" in scores_of(str(folder), None, "reward_model.path")[0]
    assert scores_of(str(folder), "v_head", "reward_model.path") == []
    assert "has no head value_head" in scores_of(str(folder), "value_head", "reward_model.path")[0]
    labels, good = tmp_path / "labels", tmp_path / "good"
    tiny("bert", AutoModelForSequenceClassification, id2label={0: "bad", 1: "good"}).save_pretrained(labels)
    for kind in ("bert", "llama", "bart", "xlnet"):
        tiny(kind, AutoModelForSequenceClassification, num_labels=1).save_pretrained(good)
        check_reward(good)
    entries = [
        {"kind": "reward_model", "name": "a", "path": str(labels)},
        {"kind": "reward_model", "name": "b", "path": str(good)},
        {"kind": "reward_model", "name": "c", "path": str(folder), "head": "v_head"},
        {"kind": "llm", "name": "d", "model": "m", "repeats": 0},
        {"kind": "llm", "name": "e", "model": "m", "max_completion_tokens": -1},
    ]
    found = judges({"compare": {"judges": entries}})
    assert len(found) == 3
    assert "compare.judges[0].path: " in found[0]
    assert "has 2 labels (bad, good)" in found[0]
    assert "repeats is 0" in found[1]
    assert "max_completion_tokens is -1" in found[2]
