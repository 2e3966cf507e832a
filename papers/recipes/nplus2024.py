"""Huang et al. 2024: the N+ implementation details of RLHF with PPO, on TL;DR."""

from ppo_vs_dpo.papers.claims import Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.testbed import draw, read

PLACE = "Huang et al. 2024 (2403.17031)"

PAPER = Paper(
    name="nplus2024",
    title="Huang et al. 2024: The N+ implementation details of RLHF with PPO (2403.17031)",
    question="With every detail in place, does RLHF by PPO scale, and how sure is it from one seed to the next?",
    takes="8 x H100 a run (released code); 1B, 2.8B, 6.9B, four seeds each",
    world="the testbed: real SFT, reward model, PPO and DPO with a known reward",
    read=read,
    draw=draw,
    published=(
        ("SFT, wins against the reference: 1B, 2.8B, 6.9B", ".33, .41, .43", "a figure, read off by eye [F]"),
        ("PPO, wins against the reference: 1B, four seeds", ".20, .22, .54, .62", "a figure, read off by eye [F]"),
        ("PPO, wins against the reference: 2.8B; 6.9B", ".705-.75; .75-.78", "a figure, read off by eye [F]"),
        ("reward model, validation accuracy: 1B, 2.8B, 6.9B", ".628, .669, .689", f"{PLACE} [S]"),
        ("DPO's implicit reward model: 1B, 2.8B, 6.9B", ".621, .664, .674", "a figure, read off by eye [F]"),
        ("the recipe in TRL, 1B: SFT, PPO", "33.0 %, 64.7 %", "TRL's documentation [C]"),
        ("accuracy by labelling batch, 1B", "50.8-77.1 %", f"{PLACE} [S]"),
    ),
    unknown=("the table behind the win-rate figure", "how many posts SFT saw (from memory: 116,722)"),
    statements=(
        Statement(
            "PPO beats its SFT policy on every seed (at 2.8B and above)",
            f"{PLACE} [F]",
            ".705-.78 against .41-.43 over the reference",
            "win rate of PPO against SFT, gold judge, the worst seed",
            figure("ppo beats sft"),
            least=0.5,
            always=True,
        ),
        Statement(
            "The first rollout's KL to the reference is 0",
            f"{PLACE}, detail 7 and the released reference output [C]",
            "ratio 1, approxkl 0",
            "mean sequence KL of the first rollout, nats",
            figure("first kl"),
            most=1e-4,
            always=True,
        ),
        Statement(
            "Trained policies learn to stop",
            f"{PLACE}, details 3 and 23",
            "nearly all end within the budget",
            "share of PPO's answers that end by themselves, the worst seed",
            figure("ppo eos"),
            least=0.95,
            always=True,
        ),
        Statement(
            "The reward model beats chance by far less than its training suggests it could",
            f"{PLACE} [S]",
            ".628 to .689 on held-out pairs",
            "accuracy on held-out pairs as a share of the way from chance to the labels' ceiling",
            lambda report: (
                (report["figures"]["reward model accuracy"] - 0.5) / (report["figures"]["reward model ceiling"] - 0.5)
            ),
            least=0.5,
            most=1.0,
        ),
    ),
)
