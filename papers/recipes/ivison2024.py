"""Ivison et al. 2024: unpacking DPO and PPO."""

from ppo_vs_dpo.papers.claims import Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.testbed import draw, read

PLACE = "Ivison et al. 2024 (2406.09279)"

PAPER = Paper(
    name="ivison2024",
    title="Ivison et al. 2024: Unpacking DPO and PPO (2406.09279)",
    question="Which matters most: preference data, algorithm, reward model or prompts?",
    takes="TPU v3-128 and -256; planned on 32 GPUs of 80 GB",
    world="the testbed: real SFT, reward model, PPO and DPO on one pair set with a known reward",
    read=read,
    draw=draw,
    published=(
        ("PPO less DPO, average over five data sets", "+0.7 points", f"{PLACE} [S]"),
        ("PPO less DPO: reasoning, coding, safety", "+1.3, +2.9, +2.3", f"{PLACE} [S]"),
        ("PPO less DPO: instruction following, factuality, truthfulness", "+0.1, -0.1, -2.5", f"{PLACE} [S]"),
        ("best average, UltraFeedback (fine-grained) with PPO", "61.0", f"{PLACE} [S]"),
        ("order of importance", "preference data, algorithm, reward model, prompts", f"{PLACE} [S]"),
    ),
    unknown=("whether the released command is the paper's: the repository says that not all match",),
    statements=(
        Statement(
            "On the same pairs PPO is better than DPO",
            f"{PLACE} [S]",
            "+0.7 points on average",
            "win rate of PPO against DPO, gold judge",
            figure("ppo beats dpo"),
            least=0.5,
        ),
        Statement(
            "... also at equal KL",
            f"{PLACE}: not claimed; the fair form of the first",
            "not measured",
            "win rate of PPO against DPO at the KL of the closer one, gold judge",
            figure("ppo beats dpo at one kl"),
            least=0.5,
        ),
    ),
)
