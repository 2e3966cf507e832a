"""Frozen models that are read: in the arithmetic of the stages that trained them."""

import pytest
import torch

from ppo_vs_dpo.compare import stage
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes.inference import Ranks


def test_models_are_read_in_the_arithmetic_they_trained_in(tiny_llama, tmp_path):
    """bfloat16 products where the stages make them: bit for bit those of autocast on fp32 weights."""
    tiny_llama().save_pretrained(tmp_path)
    ids = torch.tensor([[1, 6, 7]])
    for config, dtype in ((ModelConfig(bf16=True), torch.bfloat16), (ModelConfig(), torch.float32)):
        frozen = Ranks().load(load_policy, tmp_path, config).model
        assert frozen.model.layers[0].mlp.up_proj.weight.dtype == dtype
        assert frozen.model.embed_tokens.weight.dtype == torch.float32
        with Ranks.computing(config):
            found = frozen(ids).logits
        assert found.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert torch.equal(found, tiny_llama()(ids).logits)


def test_compare_asks_its_models_in_it(monkeypatch):
    class Reached(Exception):
        pass

    def judges(*arguments):
        raise Reached(torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(stage, "make_judges", judges)
    monkeypatch.setattr(stage, "model_settings", lambda context: ModelConfig(bf16=True))
    monkeypatch.setattr(stage.Ranks, "join", classmethod(lambda cls, *arguments: cls()))
    with pytest.raises(Reached) as raised:
        stage.ask_models(_Anything(), _Anything(), None, [])
    assert raised.value.args == (True,)


class _Anything:
    """A context of which nothing counts here."""

    def __getattr__(self, name):
        return _Anything()

    def __call__(self, *arguments):
        return _Anything()

    def __truediv__(self, other):
        return _Anything()
