"""Rafailov et al. 2023: DPO beside PPO, on sentiment, TL;DR and HH."""

from ppo_vs_dpo.papers.claims import Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.testbed import draw, read

PLACE = "Rafailov et al. 2023 (2305.18290)"

PAPER = Paper(
    name="dpo2023",
    title="Rafailov et al. 2023: Direct preference optimization (2305.18290)",
    question="Does DPO reach more reward at the same KL than PPO, and more wins, from the same pairs?",
    takes="HH: 4 x A100-80GB, SFT about 1:30 h, DPO about 2:45 h (released code, README)",
    world="the testbed: a written world of reviews with a known reward; real SFT, reward model, PPO, DPO",
    read=read,
    draw=draw,
    published=(
        ("sentiment: PPO's points on the frontier that a DPO point dominates", "26 of 27", "figure 2 decoded [S]"),
        ("TL;DR, wins against the reference: DPO, PPO, best-of-128", "61 %, 57 %, 57.4 %", f"{PLACE}, n = 256 [P; S]"),
        ("61.7 % against 57.0 % at n = 256", "z = 1.08: not significant", "our arithmetic"),
        ("HH, wins against the chosen: DPO, best-of-128", "62.9 %, 60.8 %", f"{PLACE} [S]"),
        ("CNN/DailyMail at temperature 0: DPO, PPO", "0.36, 0.26", f"{PLACE} [P]"),
    ),
    unknown=(
        "sentiment: learning rates of SFT, reward model and PPO, response length, number of updates",
        "TL;DR and HH: counts behind each temperature",
        "which learning rate was used: the paper prints 1e-6, the released code has 5e-7",
    ),
    explanations={
        "At equal KL DPO wins at least as often as PPO": (
            "the testbed's reward model generalises to the policy's new samples, and PPO sees them; DPO only ever "
            "sees the SFT policy's"
        ),
        "As trained, DPO wins at least as often as PPO": "as above",
    },
    statements=(
        Statement(
            "At equal KL DPO wins at least as often as PPO",
            f"{PLACE}, fig. 2 left: DPO's frontier dominates",
            "dominates everywhere",
            "win rate of DPO against PPO at the KL of the closer one, gold judge",
            lambda report: 1.0 - report["figures"]["ppo beats dpo at one kl"],
            least=0.5,
        ),
        Statement(
            "As trained, DPO wins at least as often as PPO",
            f"{PLACE}, fig. 2 right (TL;DR)",
            "61 % against 57 % over the reference",
            "win rate of DPO against PPO, gold judge",
            figure("dpo beats ppo"),
            least=0.5,
        ),
        Statement(
            "DPO beats its SFT policy",
            f"{PLACE}, fig. 2 and 3",
            "above SFT on every task",
            "win rate of DPO against SFT, gold judge",
            figure("dpo beats sft"),
            least=0.5,
        ),
        Statement(
            "DPO does at least as well as best-of-n of its SFT policy",
            f"{PLACE}, fig. 3 (HH: 62.9 % against 60.8 % for n = 128) [S]",
            "similar or better than n = 128",
            "win rate of DPO against best-of-16, gold judge",
            figure("dpo beats best_of_16"),
            least=0.5,
        ),
    ),
)
