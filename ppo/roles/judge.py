"""A judge as the reward: a language model that reads a response beside the reference's to the same prompt.

The score is how likely the judge finds the response the better one, over both orders of presentation: 1/2 is as good
as the reference. It lies in [0, 1], as a preference does (`ppo.roles.shaping.par` has the same from a reward model).
"""

from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.ppo.roles.rewards import RewardError
from ppo_vs_dpo.preferences.judging.llm import Comparison, LLMJudge, LLMJudgeConfig
from ppo_vs_dpo.preferences.schema import text_of


class JudgeReward:
    """Win probability against the reference's response, by a judge that reads (`preferences.judging.llm.LLMJudge`).

    Replies are kept in the judge's cache, so a run that stopped asks nothing twice. A failure is no reward: an
    endpoint that is down, a reply without a verdict, a bound that is reached stop the run, and say where.

    Args:
        judge: an endpoint, asked ``concurrency`` times at once, or a local model, asked one by one.
        ranks: share the bound ``max_cost``; each asks about its own responses.

    Attributes:
        wants_references: it is called with ``reference_answers``, the reference's answer to each prompt.
    """

    wants_references = True

    def __init__(self, judge: LLMJudge, ranks: int = 1):
        self.judge = judge
        self.name = f"judge {judge.name}"
        self.most = None if judge.config.max_cost is None else judge.config.max_cost / ranks
        # The bound is that of the run, here: what is left of it is looked at before each rollout.
        judge.config.max_cost = None
        self._before = judge.cache.paid()

    @property
    def spent(self) -> float:
        """Money so far, of attempts that were interrupted, too."""
        price, usage = self.judge.config, self.judge.usage
        tokens = (self._before[0] + usage.prompt_tokens, self._before[1] + usage.completion_tokens)
        return (tokens[0] * price.price_in + tokens[1] * price.price_out) / 1e6

    def __call__(
        self, prompts, completions, prompt_ids, response_ids, finished, reference_answers, **columns
    ) -> list[float]:
        texts = [(text_of(prompt), *two) for prompt, *two in zip(prompts, completions, reference_answers, strict=True)]
        # The same question is asked once; who answers as the reference is as good as the reference.
        asked = {one: row for row, one in reversed(list(enumerate(texts))) if one[1] != one[2]}
        comparisons = [Comparison("policy", "reference", str(row), *one) for one, row in asked.items()]
        estimate = self.judge.estimate(comparisons)["cost"]
        if self.most is not None and self.spent + estimate > self.most:
            raise RewardError(
                f"{self.name}: {self.spent:.2f} have been spent, and the next {len(prompts)} responses would cost up "
                f"to {estimate:.2f}: more than max_cost ({self.most:.2f} for this rank). Raise ppo.judge.max_cost to "
                f"go on; what was paid for is kept."
            )
        try:
            found, stopped = self.judge.judge(comparisons)
        except UserError as error:
            raise RewardError(str(error)) from error
        if stopped:
            raise RewardError(f"{self.name} stopped: {stopped}. What it said is kept; start the same command again.")
        verdicts: dict[int, list[float]] = {row: [] for row in asked.values()}
        for one in found:
            if one.preference is None:
                raise RewardError(
                    f"{self.name} named no verdict for sample {one.prompt_id} ({one.why}, after {one.attempts} tries; "
                    f"its last words: {one.raw[-80:]!r}). A failure is no reward: raise reasks or the budget, or take "
                    f"another judge.",
                    int(one.prompt_id),
                )
            verdicts[int(one.prompt_id)].append(one.preference)
        score = {row: sum(values) / len(values) for row, values in verdicts.items()}
        return [score[asked[one]] if one in asked else 0.5 for one in texts]


def judge_settings(section: dict[str, Any] | None) -> LLMJudgeConfig:
    """``ppo.judge`` as `LLMJudgeConfig`.

    Raises:
        UserError: it is not there, or has unknown keys, or no model.
    """
    if not section:
        raise UserError(
            "ppo.reward names judge, and ppo.judge is empty: say who judges, e.g. ppo.judge={model: my/chat-model, "
            "local: true} or ppo.judge={model: NAME, base_url: http://host:8000/v1}."
        )
    config, _ = split({"name": "judge", **section}, LLMJudgeConfig, where="ppo.judge", kind="judge")
    if config.model == "???":
        raise UserError("ppo.judge.model: required, and not set.")
    if config.n_prompts is not None or config.pairs:
        raise UserError("ppo.judge: n_prompts and pairs are of compare's judges; PPO asks about every response.")
    return config
