"""Each check on figures of a healthy run and of the illness it is made for."""

import pytest

from ppo_vs_dpo.ppo.watching.diagnosis import CHECKS, Diagnosis

HEALTHY = {
    "val/first_ratio_deviation": 1e-7,
    "objective/kl": 2.0,
    "objective/kl_se": 0.1,
    "objective/rlhf_reward": 1.0,
    "objective/scores_std": 1.0,
    "response/eos_rate": 0.99,
    "response/length": 20.0,
    "policy/entropy": 1.5,
    "policy/clipfrac_avg": 0.05,
    "val/explained_variance": 0.6,
    "engine/logprob_difference_mean": 0.02,
}


def run(rows):
    """All warnings of a run, by kind."""
    diagnosis = Diagnosis()
    for update, row in enumerate(rows, start=1):
        diagnosis.observe(update, {**HEALTHY, **row})
    return diagnosis.said


def test_a_healthy_run_is_left_in_peace():
    assert run([{"objective/rlhf_reward": 0.1 * i} for i in range(60)]) == []


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("non-finite figure", [{"loss/policy_avg": float("nan")}]),
        ("ratio is not 1 at first", [{"first_ratio/mean": 0.02}]),
        ("negative KL", [{"objective/kl": -0.5}]),
        ("no EOS", [{"response/eos_rate": 0.2}]),
        ("no EOS", [{}, {"response/eos_rate": 0.3}]),
        ("reward saturation", [{}, {}, {"objective/scores_std": 0.01}]),
        ("reward without spread", [{"objective/scores_std": 0.0}] * 3),
        ("reward does not rise", [{}] * 31),
        ("entropy collapse", [{}, {}, {"policy/entropy": 0.1}]),
        ("length drift", [{}, {}, {"response/length": 45.0}]),
        ("length drift", [{}, {}, {"response/length": 5.0}]),
        (
            "value model not learning",
            [{"val/explained_variance": -0.3, "objective/rlhf_reward": i} for i in range(20)],
        ),
        ("updates too large", [{"policy/clipfrac_avg": 0.5}] * 3),
        ("engine and trainer apart", [{"engine/logprob_difference_mean": 0.3}]),
    ],
)
def test_each_illness_is_named_once(kind, rows):
    assert run([*rows, *rows[-1:]]) == [kind]


def test_noise_below_zero_is_no_negative_kl():
    assert run([{"objective/kl": -0.3, "objective/kl_se": 0.1}]) == []


def test_every_check_has_its_case():
    kinds = {case[0] for case in test_each_illness_is_named_once.pytestmark[0].args[1]}
    assert len(kinds) == len(CHECKS)


def test_a_warning_says_what_why_and_what_to_try():
    (text,) = Diagnosis().observe(4, {**HEALTHY, "objective/kl": -0.5})
    assert text.startswith("update 4: negative KL: the KL estimate is -0.5 nats, 5 standard errors below 0.")
    assert "top_k=0" in text


def test_state_goes_on_after_a_resume():
    first = Diagnosis()
    first.observe(1, HEALTHY)
    first.observe(2, {**HEALTHY, "objective/kl": -0.5})
    second = Diagnosis()
    second.load_state_dict(first.state_dict())
    assert second.observe(3, {**HEALTHY, "objective/kl": -0.5}) == []
    assert second.observe(4, {**HEALTHY, "policy/entropy": 0.1})


def said(make_trainer, **settings):
    """What the diagnosis of a real run says, by kind."""
    reward = settings.pop("reward", None)
    trainer = make_trainer({"reward_funcs": reward} if reward else None, diagnose=True, **settings)
    trainer.train()
    return trainer.loop.diagnosis.said


def test_real_runs_that_go_wrong(make_trainer):
    """The figures a real trainer logs set the checks off, not only made-up ones."""
    assert "no EOS" in said(make_trainer, response_length=1, max_steps=1)
    constant = {"reward": lambda prompts, completions: [1.0] * len(prompts), "max_steps": 31, "num_ppo_epochs": 1}
    assert "reward does not rise" in said(make_trainer, **constant, kl_coef=0.0, missing_eos_penalty=None)
    frozen = {"value_learning_rate": 0.0, "max_steps": 20, "learning_rate": 1e-5}
    assert "value model not learning" in said(make_trainer, **frozen)
