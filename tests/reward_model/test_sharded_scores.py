"""The probe of a score under ZeRO-3, on real processes: in pieces a model is read as it is whole."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes.inference import Ranks, inference_settings
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded, whole
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from tests.architectures import DECODERS, tiny
from tests.ranks import on_ranks, settings_of

PROMPTS = ["the film", "a story was", "very", "the"]
ANSWERS = ["good good bad", "dull", " very very dull and bad", "bright"]
KINDS = ("llama", "gpt2", "mixtral", "bert", "deberta-v2", "distilbert", "modernbert", "silent llama", "silent bert")


def score(folders: dict) -> dict:
    """Scores of this rank's rows by models in pieces, and how they are read."""
    rank = torch.distributed.get_rank()
    ranks = Ranks(rank, 2, inference_settings(settings_of("zero3"), torch.float32))
    mine, found = ranks.share(len(PROMPTS)), {}
    for kind, folder in folders.items():
        frozen = ranks.load(load_reward, folder, ModelConfig())
        assert all(is_sharded(parameter) for parameter in frozen.model.parameters())
        scorer = RewardScorer.of(frozen.model, folder)
        assert "reader" not in vars(scorer)  # it has not been asked yet
        scores = scorer.score([PROMPTS[row] for row in mine], [ANSWERS[row] for row in mine])
        head = getattr(frozen.model, "score", None) or frozen.model.classifier
        with whole(head.parameters(), write=False):
            left = not any(p.any() for p in head.parameters() if p.dim() == 2)
        found[kind] = (ranks.merge(scores, len(PROMPTS)), scorer.reader.fast, scorer.reader.causal, left)
    return found


def answer(folder: str) -> torch.Tensor:
    """Logits of a policy in pieces."""
    ranks = Ranks(torch.distributed.get_rank(), 2, inference_settings(settings_of("zero3"), torch.float32))
    frozen = ranks.load(load_policy, folder, ModelConfig())
    with torch.no_grad():
        return frozen.model(torch.tensor([[6, 7, 8]])).logits.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_is_complete_in_pieces(tiny_llama, tmp_path, tied):
    """What a folder lacks is told apart from what is tied."""
    model = tiny_llama(0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for found in on_ranks(2, answer, str(tmp_path)):
        whole = model(torch.tensor([[6, 7, 8]])).logits.detach()
        torch.testing.assert_close(torch.tensor(found), whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_in_pieces_as_whole(word_tokenizer, tmp_path):
    expected, folders = {}, {}
    for kind in KINDS:
        silent, _, name = kind.rpartition(" ")
        model = tiny(name, AutoModelForSequenceClassification, num_labels=1)
        if silent:
            torch.nn.init.zeros_((getattr(model, "score", None) or model.classifier).weight)
        folders[kind] = str(tmp_path / kind)
        model.save_pretrained(folders[kind])
        word_tokenizer.save_pretrained(folders[kind])
        expected[kind] = RewardScorer(model, word_tokenizer).score(PROMPTS, ANSWERS)
    for found in on_ranks(2, score, folders):
        for kind, (scores, fast, causal, silent) in found.items():
            assert scores == pytest.approx(expected[kind], abs=1e-5), kind
            assert (fast, causal) == ((kind.split()[-1] in DECODERS),) * 2, kind
            assert silent == kind.startswith("silent")
