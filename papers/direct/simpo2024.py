"""Meng et al. 2024: SimPO's DPO baselines."""

from ppo_vs_dpo.papers.paper import Paper

README = "princeton-nlp/SimPO, README [C]"

PAPER = Paper(
    name="simpo2024",
    title="Meng et al. 2024: SimPO (2405.14734): its DPO baselines",
    question="How good is DPO once its beta and learning rate are searched?",
    takes="released for 8 x H100 (README); Mistral-7B and Llama-3-8B, one pass over UltraFeedback",
    published=(
        ("Mistral-Base 7B DPO: AlpacaEval 2 LC, WR; Arena-Hard", "15.1, 12.5; 10.4", README),
        ("Mistral-Instruct 7B DPO: AlpacaEval 2 LC, WR; Arena-Hard", "26.8, 24.9; 16.3", README),
        ("Llama-3-Base 8B DPO: AlpacaEval 2 LC, WR; Arena-Hard", "18.2, 15.5; 15.9", README),
        ("Llama-3-Instruct 8B DPO: AlpacaEval 2 LC, WR; Arena-Hard", "40.3, 37.9; 32.6", README),
        ("Llama-3-Instruct 8B SimPO: AlpacaEval 2 LC, WR; Arena-Hard", "44.7, 40.5; 33.8", README),
        (
            "a user's rerun of SimPO, Mistral-Instruct: LC",
            "27.55 +- 1.3 against 32.1",
            "an issue of that repository [R]",
        ),
    ),
    unknown=("the spread over seeds",),
)
