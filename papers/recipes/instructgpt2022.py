"""Ouyang et al. 2022: InstructGPT."""

from ppo_vs_dpo.papers.paper import Paper

PLACE = "Ouyang et al. 2022 (2203.02155)"

PAPER = Paper(
    name="instructgpt2022",
    title="Ouyang et al. 2022: Training language models to follow instructions with human feedback (2203.02155)",
    question="Does feedback from people beat a hundred times more parameters?",
    takes="data and models are closed; planned on 8 GPUs of 80 GB at 1.3B",
    published=(
        ("reward model, accuracy; on labellers it never saw", "72.4 +- .4 %; 69.6 +- .9 %", f"{PLACE} [P]"),
        ("agreement between labellers; with held-out ones", "72.6 +- 1.5; 77.3 +- 1.3 %", f"{PLACE} [P]"),
        ("PPO-ptx: coefficient, pretraining examples a prompt", "27.8, 8", f"{PLACE} [P]"),
        (
            "policy learning rate",
            "swept from 2.55e-6 to 2.55e-5; above 8.05e-6 it diverged without ptx",
            f"{PLACE} [P]",
        ),
    ),
    unknown=(
        "the policy's learning rate: not printed anywhere in the paper",
        "the labelled comparisons and the prompts",
        "SFT's learning rate and passes (not in our notes)",
    ),
)
