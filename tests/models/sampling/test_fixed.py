"""Decoding at fixed addresses: a recorded step, repeated, gives the tokens of the ordinary loop."""

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling import fixed
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.models.sampling.picking import LOOK_EVERY
from tests.models.sampling.recorded_graph import RecordedGraph

PROMPTS = [[1, 6, 7], [1, 9], [1, 10, 11, 12, 13], [1, 6, 8, 14]]


@pytest.fixture
def graphs(monkeypatch):
    """Steps are recorded and repeated, cache columns shown 16 at a time; the graphs that were made."""
    monkeypatch.setitem(fixed.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(fixed, "BUCKET", 16)
    monkeypatch.setattr(fixed, "WORTH", 3)
    RecordedGraph.made.clear()
    yield RecordedGraph.made
    RecordedGraph.made.clear()


def draw(model, prompts=PROMPTS * 4, tokenizer=None, logprobs=False, **settings):
    sampling = SamplingConfig(**{"max_new_tokens": 37, **settings})
    seeds = range(len(prompts))
    return generate(
        model, prompts, sampling, eos_token_ids=[2], seeds=seeds, tokenizer=tokenizer, with_logprobs=logprobs
    )


WAYS = {
    "padded": {},
    "grouped queries": {"heads": 1},
    "equal lengths, greedy": {"prompts": [[1, 6, 7], [1, 9, 4], [1, 5, 5]], "temperature": 0.0},
    "top-k and top-p": {"top_k": 12, "top_p": 0.9, "temperature": 0.7},
    "several batches": {"batch_size": 6},
    "one token": {"max_new_tokens": 1},
    "nothing to repeat": {"max_new_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_of_the_ordinary_loop(tiny_llama, graphs, way):
    settings = dict(WAYS[way])
    model = tiny_llama(seed=3, num_key_value_heads=settings.pop("heads", 2), initializer_range=0.2)
    greedy = settings.get("temperature") == 0
    repeated = draw(model, logprobs=not greedy, **settings)
    assert sum(graph.replays for graph in graphs) > 15 or settings.get("max_new_tokens")
    plainly = draw(model, logprobs=not greedy, cuda_graphs=False, **settings)
    assert [(g.token_ids, g.finished) for g in repeated] == [(g.token_ids, g.finished) for g in plainly]
    if not greedy:
        for one, other in zip(repeated, plainly, strict=True):
            # Masked columns and rows that have ended change how sums are rounded, no more.
            assert one.logprobs == pytest.approx(other.logprobs, abs=5e-6)
            assert one.entropy == pytest.approx(other.entropy, abs=5e-6)
    if way == "padded":
        lengths = [len(g.token_ids) for g in plainly]
        # Rows end at all times, after the last look, too; columns and rows change shape.
        assert len({*lengths}) > 4
        assert any(g.finished and len(g.token_ids) % LOOK_EVERY for g in plainly)
        assert len(graphs) >= 3


def test_stop_strings_end_a_row(tiny_llama, word_tokenizer, graphs):
    model = tiny_llama(seed=3, vocab_size=len(word_tokenizer))
    settings = {"tokenizer": word_tokenizer, "stop_strings": ["film", "good"]}
    repeated = draw(model, **settings)
    assert sum(graph.replays for graph in graphs) > 5
    plainly = draw(model, cuda_graphs=False, **settings)
    assert [(g.token_ids, g.finished) for g in repeated] == [(g.token_ids, g.finished) for g in plainly]
    assert any(g.finished and g.token_ids[-1] != 2 for g in plainly)


@pytest.mark.parametrize("adapters", [False, True])
def test_under_autocast_casts_are_done_before(tiny_llama, graphs, adapters):
    """Weights' copies in half precision are there when a step is recorded: no step casts them again."""
    model = tiny_llama(seed=3)
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        repeated = draw(model, logprobs=True)
        plainly = draw(model, logprobs=True, cuda_graphs=False)
    first = [(one.logprobs[0], other.logprobs[0]) for one, other in zip(repeated, plainly, strict=True)]
    assert [one for one, _ in first] == pytest.approx([other for _, other in first], abs=0.05)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2 and p.requires_grad}
    cast = [
        args[0].untyped_storage().data_ptr()
        for function, args, _, _ in graphs[0].calls
        if function is torch.ops.aten._to_copy.default
    ]
    assert graphs[0].replays
    assert not weights & set(cast)


def test_what_cannot_be_captured_goes_on_without(tiny_llama, graphs, monkeypatch):
    said = []
    monkeypatch.setattr(fixed.logger, "warning", lambda text, *args: said.append(text % args))

    class Fails(RecordedGraph):
        def __init__(self, step):
            super().__init__(lambda: (step(), torch.ones(()).item()))

    monkeypatch.setitem(fixed.GRAPHS, "cpu", Fails)
    model = tiny_llama(seed=3)
    found = draw(model, batch_size=8)
    assert [g.token_ids for g in found] == [g.token_ids for g in draw(tiny_llama(seed=3), cuda_graphs=False)]
    # One sentence, and the next batch does not try again.
    assert len(said) == 1
    assert "without CUDA graphs: LlamaForCausalLM could not be captured (operation not permitted" in said[0]
    with pytest.raises(UserError, match="cuda_graphs is true, and LlamaForCausalLM could not be captured"):
        draw(model, cuda_graphs=True)


def test_a_graph_that_does_something_else_is_not_used(tiny_llama, graphs, monkeypatch):
    """Whatever a capture missed: the first one is held against a step that is carried out."""
    said = []
    monkeypatch.setattr(fixed.logger, "warning", lambda text, *args: said.append(text % args))

    class Idle(RecordedGraph):
        def __call__(self):
            self.replays += 1

    monkeypatch.setitem(fixed.GRAPHS, "cpu", Idle)
    found = draw(tiny_llama(seed=3), batch_size=8, logprobs=True)
    assert [g.replays for g in graphs] == [1]
    plainly = draw(tiny_llama(seed=3), batch_size=8, logprobs=True, cuda_graphs=False)
    assert [g.token_ids for g in found] == [g.token_ids for g in plainly]
    (sentence,) = said
    assert "could not be captured (a repeated step gave other logits" in sentence


def test_who_takes_graphs(tiny_llama, graphs, monkeypatch):
    device, model = torch.device("cpu"), tiny_llama()
    wanted, left = SamplingConfig(4, cuda_graphs=True), SamplingConfig(4)
    assert fixed.graphs_for(model, left, device) is RecordedGraph
    assert fixed.graphs_for(model, SamplingConfig(4, cuda_graphs=False), device) is None

    def refused(why):
        assert fixed.graphs_for(model, left, device) is None
        with pytest.raises(UserError, match=f"cuda_graphs is true, and .*{why}.*Leave it out"):
            fixed.graphs_for(model, wanted, device)

    with monkeypatch.context() as patch:
        patch.setattr(model.config, "rope_parameters", {"rope_type": "dynamic", "factor": 2.0})
        refused("chooses its rotary embedding by the positions")
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "model_type", "mamba")
        refused("is not known to decode with a cache of fixed size")
    with monkeypatch.context() as patch:
        patch.setattr(model, "is_quantized", True, raising=False)
        refused("quantized weights")
    with monkeypatch.context() as patch:
        patch.setattr(next(model.parameters()), "ds_id", 0, raising=False)
        refused("ZeRO-3 holds the weights")
    monkeypatch.delitem(fixed.GRAPHS, "cpu")
    refused("a cpu has none")


def test_a_model_of_nan_is_not_sampled_from(tiny_llama, graphs):
    model = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        draw(model)
