"""Does gold fall while the proxy rises, and later with several reward models? On the testbed, from one pool of draws.

    ppo-vs-dpo -m quickstart name=hump seed=1,2,3 stages=[data,sft,pairs,reward_model] data.pairs=3000 \\
        data.sft_examples=5000 reward_model.ensemble=4 reward_model.average_weights=true
    python benchmarks/hump.py runs/hump-seed1 runs/hump-seed2 runs/hump-seed3

Each proxy r is optimised exactly on so many draws of SFT to each held-out prompt: weights e^{r / beta}, at the beta
whose KL to the draws is the one asked for. Members of the ensemble differ in the order of their data, and start from
one head, as averaging weights needs. Writes what stands between the marks in docs/methods.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ppo_vs_dpo.artifacts.files import read_parquet, write_text  # noqa: E402
from ppo_vs_dpo.artifacts.run import RunFolder  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
MARKS = ("<!-- python benchmarks/hump.py RUN RUN RUN: from here -->", "<!-- to here -->")
PROMPTS, DRAWS = 128, 64
KLS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
# Coste et al. 2023 try 0.1 to 1 for best-of-n; PAR compares with so many draws of the reference.
UNCERTAINTY, REFERENCES = 0.5, 8


def scores_of(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gold ``(P, D)``, members ``(M, P, D)`` and averaged weights ``(P, D)`` on draws of SFT."""
    from ppo_vs_dpo.compare.judges.scores import RewardModelJudge
    from ppo_vs_dpo.compare.sampling.gather import model_config_of
    from ppo_vs_dpo.models.loading.pretrained import eos_token_ids, load_tokenizer
    from ppo_vs_dpo.models.passes.inference import Ranks
    from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, row_seed
    from ppo_vs_dpo.models.text.encoding import encode_prompts
    from ppo_vs_dpo.models.text.prompts import decode_completion
    from ppo_vs_dpo.preferences.recipes.named import load_gold

    run = RunFolder(folder)
    config, ranks = model_config_of(run), Ranks()
    kept = run.cache("hump.npz")
    if kept.is_file():
        with np.load(kept) as found:
            return found["gold"], found["members"], found["average"]
    from ppo_vs_dpo.models.loading.pretrained import load_policy

    tokenizer = load_tokenizer(run.stage_dir("sft") / "model", config)
    policy = ranks.load(load_policy, run.stage_dir("sft") / "model", config)
    prompts = list(read_parquet(run.path("data", "prompts_heldout.parquet"), ["prompt"])["prompt"])[:PROMPTS]
    ids = encode_prompts(tokenizer, prompts)
    rows = [row for row in range(len(prompts)) for _ in range(DRAWS)]
    with policy.generating():
        drawn = generate(
            policy.model,
            [ids[row] for row in rows],
            SamplingConfig(max_new_tokens=int(run.config.data.max_new_tokens), temperature=1.0, batch_size=512),
            eos_token_ids=eos_token_ids(policy.model, tokenizer),
            seeds=[row_seed(int(run.config.seed), "hump", number) for number in range(len(rows))],
        )
    texts = [decode_completion(tokenizer, one.token_ids) for one in drawn]
    ended, asked = [one.finished for one in drawn], [prompts[row] for row in rows]
    stage = run.stage_dir("reward_model")
    folders = sorted((stage / "members").glob("*/model"), key=lambda path: int(path.parent.name))

    def by(path: Path) -> np.ndarray:
        return RewardModelJudge(path, config, ranks).score(asked, texts, ended).reshape(len(prompts), DRAWS)

    gold = np.array(load_gold(run.config.data.gold)(asked, texts, finished=ended), dtype=float)
    members, average = np.stack([by(path) for path in folders]), by(stage / "model")
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, gold=gold.reshape(len(prompts), DRAWS), members=members, average=average)
    return gold.reshape(len(prompts), DRAWS), members, average


def proxies(members: np.ndarray, average: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Name -> proxies ``(P, D)`` whose curves are averaged."""
    import torch

    from ppo_vs_dpo.ppo.roles.shaping import combined, par

    # Centred under SFT, as PPO takes them: or the worst of four would be the one with the lowest zero.
    flat = torch.tensor(members - members.mean((1, 2), keepdims=True)).flatten(1).T
    shape = average.shape

    def ensemble(kind: str) -> list[np.ndarray]:
        return [combined(flat, kind, UNCERTAINTY).numpy().reshape(shape)]

    def shaped(scores: np.ndarray) -> np.ndarray:
        references = np.repeat(scores[:, :REFERENCES], shape[1], axis=0)
        return par(torch.tensor(scores.ravel()), torch.tensor(references)).numpy().reshape(shape)

    return {
        "one model": list(members),
        "mean of four": ensemble("mean"),
        "worst of four": ensemble("worst"),
        f"mean less {UNCERTAINTY} variance": ensemble("uncertainty"),
        "weights averaged (WARM)": [average],
        "one model, PAR": [shaped(one) for one in members],
    }


def tilted(proxy: np.ndarray, kl: float) -> np.ndarray:
    """Weights ``(P, D)`` proportional to e^{r / beta} on each prompt's draws, with this mean KL to equal weights."""
    low, high = 1e-4, 1e4  # beta: KL falls with it
    for _ in range(60):
        beta = np.sqrt(low * high)
        logits = proxy / beta
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = np.where(weights > 0, weights * np.log(weights * weights.shape[1]), 0).sum(1).mean()
        low, high = (low, beta) if moved < kl else (beta, high)
    return weights


def curves(folder: str) -> dict[str, np.ndarray]:
    """Name -> ``(KLs,)`` mean gold reward at each KL."""
    gold, members, average = scores_of(folder)
    found = {}
    for name, group in proxies(members, average).items():
        found[name] = np.array([np.mean([(tilted(one, kl) * gold).sum(1).mean() for one in group]) for kl in KLS])
    found["gold itself"] = np.array([(tilted(gold, kl) * gold).sum(1).mean() for kl in KLS])
    return found


def table(of_seed: list[dict[str, np.ndarray]]) -> list[str]:
    """Mean gold at each KL; the fall from the peak; the gain on one model at the largest KL, seed by seed."""
    kls = " | ".join(f"KL {kl}" for kl in KLS)
    lines = [
        f"| optimised | {kls} | fall from its peak | at KL {KLS[-1]} above one model, by seed |",
        f"|---|{'---|' * (len(KLS) + 2)}",
    ]
    for name in of_seed[0]:
        mean = np.stack([one[name] for one in of_seed]).mean(0)
        gains = [one[name][-1] - one["one model"][-1] for one in of_seed]
        shown = "–" if name == "one model" else ", ".join(f"{gain:+.2f}" for gain in gains)
        cells = [name, *(f"{value:.2f}" for value in mean), f"{mean.max() - mean[-1]:.2f}", shown]
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    return lines


def main() -> int:
    """Write the page's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    found: list[dict[str, Any]] = [curves(run) for run in parser.parse_args().runs]
    made = "\n".join(["", *table(found), ""])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_text(PAGE, f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{after}")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
