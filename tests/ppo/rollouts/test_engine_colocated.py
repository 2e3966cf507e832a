"""vLLM in every rank's process: a whole run with a stand-in for ``vllm.LLM``, on one rank and under ZeRO-3."""

import pytest

from tests.models.sampling.pretended_vllm import LLM, installed
from tests.ppo.conftest import logs
from tests.ranks import on_ranks, settings_of


def trained(make_trainer, deepspeed, sleeps):
    """Figures of a run, and the calls that its engine got."""
    with installed():
        trainer = make_trainer(
            max_steps=2, generation_engine="vllm", vllm_enable_sleep_mode=sleeps, learning_rate=1e-3,
            deepspeed=settings_of(deepspeed) if deepspeed else None,
        )  # fmt: skip
        trainer.train()
        (llm,) = LLM.made
        return logs(trainer), llm.calls, llm.backend


@pytest.mark.parametrize(("ranks", "deepspeed", "sleeps"), [(1, None, None), (2, None, True), (2, "zero3", True)])
def test_a_run(make_trainer, ranks, deepspeed, sleeps):
    """Each rank's engine samples with the present weights: its log-probabilities are the trainer's after each update.

    Asleep it holds no weights, and the order of calls is the one that vLLM asks for (the stand-in insists on it).
    """
    for rows, calls, backend in on_ranks(ranks, trained, make_trainer, deepspeed, sleeps):
        assert len(rows) == 2
        assert max(row["engine/logprob_difference_max"] for row in rows) < 1e-5
        assert min(row["policy/approxkl_avg"] for row in rows) > 1e-6
        assert backend == ("external_launcher" if ranks > 1 else None)
        if sleeps:
            once = ["wake weights", "weights", "wake kv_cache", "generate", "sleep"]
            assert calls == ["sleep", *once, *once]
        else:
            assert calls == ["weights", "generate"] * 2
