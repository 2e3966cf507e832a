"""Ahmadian et al. 2024: back to basics, REINFORCE with the other samples as the baseline."""

from ppo_vs_dpo.papers.paper import Paper

PLACE = "Ahmadian et al. 2024 (2402.14740)"

PAPER = Paper(
    name="rloo2024",
    title="Ahmadian et al. 2024: Back to basics: REINFORCE-style optimization for RLHF (2402.14740)",
    question="Does RLHF need PPO's critic and clipping, or is REINFORCE with a good baseline enough?",
    takes="hardware not published; planned on 8 GPUs of 80 GB",
    published=(
        (
            "TL;DR, Pythia-6.9B, win rate: RLOO (k = 4), RAFT (k = 4), PPO, DPO",
            "77.9, 73.2, 67.6, 66.6",
            f"{PLACE} [S]",
        ),
        ("HH, Pythia-6.9B, win rate: RLOO (k = 4), RAFT (k = 4), PPO, DPO", "43.7, 42.1, 29.2, 39.0", f"{PLACE} [S]"),
        ("HH, Llama-7B, win rate: RLOO (k = 4), RAFT (k = 4), PPO, DPO", "64.1, 63.3, 32.0, 61.9", f"{PLACE} [S]"),
        ("PPO's clip is active on", "fewer than 5 % of batches", f"{PLACE} [S]"),
    ),
    unknown=("beta and learning rate of its DPO", "passes over a rollout"),
)
