"""Lambert et al. 2024: Tulu 3."""

from ppo_vs_dpo.papers.paper import Paper

PLACE = "Lambert et al. 2024 (2411.15124)"

PAPER = Paper(
    name="tulu3_2024",
    title="Lambert et al. 2024: Tulu 3 (2411.15124): length-normalised DPO, and PPO on verifiable rewards",
    question="What does an open recipe look like that ends with DPO and PPO?",
    takes="8B: DPO about 4 hours on one node of 8, PPO about 28 hours on two (a note about the paper)",
    published=(
        ("DPO 8B: beta, learning rate (70B)", "5, 5e-7 (2e-7)", "allenai/open-instruct, docs/tulu3.md [C]"),
        ("PPO 8B: learning rate, KL (70B)", "3e-7, .05 (1e-7, .07)", "allenai/open-instruct, docs/tulu3.md [C]"),
    ),
    unknown=("the verifiers are code, not settings: ppo.gold_reward takes a function of yours",),
)
