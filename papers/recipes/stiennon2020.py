"""Stiennon et al. 2020: learning to summarize from human feedback."""

from ppo_vs_dpo.papers.claims import Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.testbed import draw, read

PLACE = "Stiennon et al. 2020 (2009.01325)"
FREE = "ppo,kl_coef=0.0"

PAPER = Paper(
    name="stiennon2020",
    title="Stiennon et al. 2020: Learning to summarize from human feedback (2009.01325)",
    question="Does optimising a learnt reward model please people, and how far?",
    takes="320 GPU-days at 6.7B; the models were never released",
    world="the testbed: real SFT, reward model and PPO at several KL coefficients, with a known reward",
    read=read,
    draw=draw,
    published=(
        ("wins against the reference: 1.3B with feedback", "61 %", f"{PLACE} [S/C]"),
        ("wins against the reference: a ten times larger supervised model", "43 %", f"{PLACE} [S/C]"),
        ("wins against the reference: 6.7B with feedback", "about 70 % (65 % at equal length)", f"{PLACE} [S/C]"),
        ("KL where people's preference peaks", "about 10 nats, then against the reward model", f"{PLACE} [S/C]"),
        ("reward model: twice the data, twice the size", "+1.1, +1.8 points", f"{PLACE} [S/C]"),
    ),
    unknown=("SFT's learning rate (not in our notes)", "the models"),
    statements=(
        Statement(
            "A policy with feedback beats its SFT policy",
            f"{PLACE} [S/C]",
            "61 % against 43 % over the reference",
            "win rate of PPO against SFT, gold judge",
            figure("ppo beats sft"),
            least=0.5,
        ),
        Statement(
            "Optimised further, the reward model's score goes on rising ...",
            f"{PLACE} [S/C]",
            "rises to KL 250",
            "score without KL penalty less score of the main run",
            lambda report: report["figures"][f"{FREE} proxy"] - report["figures"]["ppo proxy"],
            least=0.0,
        ),
        Statement(
            "... while the true preference falls",
            f"{PLACE} [S/C]",
            "anti-correlated beyond KL 10",
            "gold without KL penalty less gold of the main run",
            lambda report: report["figures"][f"{FREE} gold"] - report["figures"]["ppo gold"],
            most=0.0,
        ),
        Statement(
            "Without a penalty the policy goes further",
            f"{PLACE} [S/C]",
            "shown to KL 250",
            "KL without penalty less KL of the main run, nats",
            lambda report: report["figures"][f"{FREE} kl"] - report["figures"]["ppo kl"],
            least=0.0,
        ),
    ),
)
