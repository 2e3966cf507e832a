"""A judge as the reward: preferred to the reference's answer? Kept replies, a bound on cost; no failure is a score."""

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.ppo.roles.judge import JudgeReward, judge_settings
from ppo_vs_dpo.ppo.stage.train import run_stage
from ppo_vs_dpo.preferences.judging.cache import Cache
from tests.compare.conftest import serve  # noqa: F401
from tests.compare.server import answers_of, judge_at
from tests.ppo.conftest import logs, same
from tests.ppo.stage.test_train import run_folder  # noqa: F401

SETTINGS = {"max_steps": 2, "missing_eos_penalty": None}


def good_wins(question, number=0):
    """A judge that counts a word."""
    first, second = (text.split().count("good") for text in answers_of(question))
    return "They differ.\n" + ("TIE" if first == second else "A" if first > second else "B")


def judge_of(server, path=None, **settings):
    return JudgeReward(judge_at(server, Cache(path), logprobs=False, **settings))


@pytest.mark.parametrize("loss", ["ppo", "dpo"])
def test_scores_are_preferences_over_the_references_answer(loss, serve, make_trainer, weights, tmp_path):  # noqa: F811
    """By hand for each response; PPO and online DPO train on them; a second run asks nothing and ends the same."""
    server = serve(good_wins)
    method = {"loss": "dpo", "samples_per_prompt": 2} if loss == "dpo" else {}
    judge = judge_of(server, tmp_path / "replies.jsonl")
    trainer = make_trainer({"reward_funcs": judge}, **SETTINGS, **method)
    trainer.prepare()
    rollout = trainer.collect(0)
    answers = trainer.roles.reference_answers["train_dataset"]
    k = method.get("samples_per_prompt", 1)
    drawn = [row for row in trainer.prompts.drawn_for(0, 16 // k, 7) for _ in range(k)]
    for row, prompt in enumerate(drawn):
        text = trainer.processing_class.decode(rollout.response_ids[row][rollout.mask[row]], skip_special_tokens=True)
        ours, theirs = (words.split().count("good") for words in (text, answers[prompt]))
        assert rollout.scores[row] == (0.5 if ours == theirs else float(ours > theirs)), (text, answers[prompt])
    assert rollout.scores.unique().numel() > 1
    trainer.train()
    asked = len(server.requests)
    assert judge.spent == 0
    again = make_trainer({"reward_funcs": judge_of(server, tmp_path / "replies.jsonl")}, **SETTINGS, **method)
    again.train()
    assert len(server.requests) == asked
    assert same(weights(trainer), weights(again))
    assert logs(again)[0]["objective/scores"] == pytest.approx(float(rollout.scores.mean()))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            lambda question, number: "I cannot say." if number == 7 else good_wins(question),
            "named no verdict for sample",
        ),
        (lambda question, number: (400, "content management policy"), "stopped"),
        (lambda question, number: 500, "stopped"),
    ],
    ids=["no verdict", "refused", "down"],
)
def test_a_failure_is_no_reward(answer, words, serve, make_trainer, tmp_path):  # noqa: F811
    trainer = make_trainer({"reward_funcs": judge_of(serve(answer), reasks=0, retries=0, concurrency=1)}, **SETTINGS)
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert list((tmp_path / "out").glob("rollout-reward-update-1/texts.jsonl"))
    assert trainer.loop.step == 0


def test_what_it_costs_is_bounded_over_attempts(serve, make_trainer, tmp_path):  # noqa: F811
    """53 tokens a reply at 1 each a token: 32 replies are paid for, and the second rollout would pass the bound."""
    server, path = serve(good_wins), tmp_path / "replies.jsonl"
    price = {"price_in": 1e6, "price_out": 1e6}
    enough = 32 * 53 + 32 * (160 + 400)
    first = judge_of(server, path, max_cost=enough, **price)
    trainer = make_trainer({"reward_funcs": first}, **SETTINGS)
    trainer.prepare()
    trainer.collect(0)
    assert 0 < first.spent <= 32 * 53
    again = judge_of(server, path, max_cost=first.spent + 1, **price)
    assert again.spent == first.spent
    trainer = make_trainer({"reward_funcs": again}, **SETTINGS)
    trainer.prepare()
    trainer.collect(0)  # all of it is kept
    with pytest.raises(UserError, match="have been spent, and the next 16 responses would cost"):
        trainer.collect(1)


def test_the_stage_and_what_it_refuses(serve, run_folder, monkeypatch):  # noqa: F811
    server = serve(good_wins)
    judge = {"model": "m", "base_url": server.url, "api_key_env": "JUDGE_KEY", "logprobs": False}
    run = run_folder(reward=["reward_model", "judge"], reward_weights=[1.0, 2.0], judge=judge, max_steps=1)
    run_stage(StageContext(run, "ppo"))
    assert len(server.requests) > 8
    assert (run.path("ppo") / "judge-0.jsonl").stat().st_size > 0
    with pytest.raises(UserError, match=r"ppo\.judge is empty"):
        run_stage(StageContext(run_folder(reward="judge"), "ppo"))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "say who judges"),
        ({"local": True}, "model: required"),
        ({"model": "m", "modle": 1}, r"modle: no such key\. Did you mean model"),
        ({"model": "m", "on": ["ppo"]}, r"on: no such key\. There are: .*pairs"),
        ({"model": "m", "n_prompts": 4}, "of compare's judges"),
    ],
)
def test_a_judge_that_cannot_be_meant(section, words):
    with pytest.raises(UserError, match=words):
        judge_settings(section)


@pytest.mark.parametrize("settings", [{"reward_shaping": "par"}, {"sync_ref_model": True}])
def test_its_reference_stands_still(settings, serve, make_trainer):  # noqa: F811
    with pytest.raises(UserError, match="does not go with it"):
        make_trainer({"reward_funcs": judge_of(serve(good_wins))}, **settings)
