"""Does gold fall while the policy moves on, and later with rewards that are harder to hack? On the testbed, by PPO.

    ppo-vs-dpo methods seed=1 name=hump-seed1 stages=[data,sft,pairs,reward_model] reward_model.ensemble=4 \\
        reward_model.average_weights=true   # and for seeds 2 and 3
    python benchmarks/hump.py runs/hump-seed1 runs/hump-seed2 runs/hump-seed3

Each way of making a reward of the four reward models trains the SFT policy without a KL penalty, so that it moves as
far as the reward leads it; gold and KL are those of the responses that each update samples, to prompts that no update
had before. What is equal: prompts, seeds, settings; RLOO's advantages, so that no value model depends on the reward.
Members differ in the order of their data and start from one head, as averaging weights needs.
Writes what stands between the marks in docs/methods.md. A training that is kept in the run's cache is not run again.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ppo_vs_dpo.artifacts.files import read_json, read_parquet, write_json, write_text  # noqa: E402
from ppo_vs_dpo.artifacts.run import RunFolder  # noqa: E402
from ppo_vs_dpo.ppo.config import PPOConfig  # noqa: E402
from ppo_vs_dpo.ppo.trainer import PPOTrainer  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
MARKS = ("<!-- python benchmarks/hump.py RUN RUN RUN: from here -->", "<!-- to here -->")
# Prompts of the rollouts: 24 x 32 of the run's 1,000, each once.
SETTINGS: dict[str, Any] = {
    "max_steps": 24, "rollout_batch_size": 128, "samples_per_prompt": 4, "advantage": "rloo", "kl_coef": 0.0,
    "per_device_train_batch_size": 64, "local_rollout_forward_batch_size": 128, "num_ppo_epochs": 2,
    "num_mini_batches": 2, "learning_rate": 1e-3, "adam_beta2": 0.95, "missing_eos_penalty": 3.0,
}  # fmt: skip
# Which reward models, and PPO's settings; Coste et al. 2023 take 0.1 for PPO.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "one model": ("first", {}),
    "mean of four": ("all", {"reward_ensemble": "mean"}),
    "worst of four": ("all", {"reward_ensemble": "worst"}),
    "mean less 0.1 variances": ("all", {"reward_ensemble": "uncertainty", "reward_ensemble_coef": 0.1}),
    "weights averaged (WARM)": ("average", {}),
    "one model, PAR": ("first", {"reward_shaping": "par", "par_references": 4}),
}
KLS = (4.0, 6.0, 8.0, 10.0, 12.0)
# Updates that are averaged: one has 128 responses to 32 prompts, and the largest of 24 noisy means is no peak.
WINDOW = 3


class Watched(PPOTrainer):
    """The trainer, with gold and KL of every rollout in ``seen``."""

    def __init__(self, *args: Any, gold: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gold, self.seen = gold, []

    def collect(self, number: int, clock: Any = None) -> Any:
        from ppo_vs_dpo.models.text.prompts import decode_completion

        rollout = super().collect(number, clock)
        prompts, texts = (
            [decode_completion(self.processing_class, row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
            for ids, mask in (
                (rollout.prompt_ids, rollout.prompt_mask.bool()), (rollout.response_ids, rollout.mask)
            )
        )  # fmt: skip
        kl = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0).sum(1)
        gold = self.gold(prompts, texts, finished=rollout.finished.tolist())
        about = {"gold": float(np.mean(gold)), "kl": float(kl.mean()), "score": float(rollout.scores.mean())}
        self.seen.append({**about, "eos": float(rollout.finished.float().mean())})
        return rollout


def train(run: RunFolder, name: str) -> list[dict[str, float]]:
    """Gold, KL and score before each update; one training, or what the run's cache has of it."""
    from datasets import Dataset

    from ppo_vs_dpo.models.loading.config import ModelConfig
    from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer
    from ppo_vs_dpo.preferences.recipes.named import load_gold
    from ppo_vs_dpo.reward_model.scorer import RewardScorer

    which, settings = WAYS[name]
    kept = run.cache("hump", f"{list(WAYS).index(name)}.json")
    asked = {**SETTINGS, **settings, "models": which}
    if kept.is_file() and read_json(kept)["settings"] == asked:
        return read_json(kept)["updates"]
    started = time.process_time()
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), run.config.model))
    stage, sft = run.stage_dir("reward_model"), run.path("sft", "model")
    members = sorted((stage / "members").glob("*/model"), key=lambda path: int(path.parent.name))
    folders = {"first": members[:1], "all": members, "average": [stage / "model"]}[which]
    models = [RewardScorer.load(folder, config, batch_size=128) for folder in folders]
    prompts = list(read_parquet(run.path("data", "prompts_train.parquet"), ["prompt"])["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            model=load_policy(sft, config, trainable=True),
            reward_model=models if len(models) > 1 else models[0],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=load_tokenizer(sft, config),
            gold=load_gold(run.config.data.gold),
            args=PPOConfig(
                output_dir=folder, seed=int(run.config.seed), response_length=int(run.config.data.max_new_tokens),
                save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, diagnose=False,
                use_cpu=True, logging_steps=10**6, **SETTINGS, **settings,
            ),
        )  # fmt: skip
        trainer.train()
    write_json(kept, {"settings": asked, "updates": trainer.seen, "cpu_seconds": time.process_time() - started})
    return trainer.seen


def smooth(updates: list[dict[str, float]], key: str) -> np.ndarray:
    """Means over `WINDOW` neighbouring updates."""
    return np.convolve([row[key] for row in updates], np.ones(WINDOW) / WINDOW, mode="valid")


def at(updates: list[dict[str, float]], kl: float) -> float:
    """Gold where the smoothed KL first passes ``kl``, linear between updates; NaN where it never does."""
    kls, golds = smooth(updates, "kl"), smooth(updates, "gold")
    beyond = np.flatnonzero(kls >= kl)
    if not len(beyond) or beyond[0] == 0:
        return float("nan")
    last = beyond[0]
    share = (kl - kls[last - 1]) / (kls[last] - kls[last - 1])
    return float(golds[last - 1] + share * (golds[last] - golds[last - 1]))


def table(of_seeds: list[dict[str, list[dict[str, float]]]]) -> list[str]:
    """Gold at each KL, mean over the seeds; peaks, falls, and the gain on one model, seed by seed."""

    def said(values: list[float], form: str = ".1f") -> str:
        return ", ".join("–" if np.isnan(value) else format(value, form) for value in values)

    lines = [
        f"| reward | {' | '.join(f'KL {kl:g}' for kl in KLS)} | gold at its peak | KL there | KL at the end | "
        "gold at the end | fall from the peak |",
        f"|---|{'---|' * (len(KLS) + 5)}",
    ]
    for name in WAYS:
        runs = [one[name] for one in of_seeds]
        means = [float(np.mean([at(updates, kl) for updates in runs])) for kl in KLS]
        golds, kls = ([smooth(updates, key) for updates in runs] for key in ("gold", "kl"))
        peaks = [int(values.argmax()) for values in golds]
        cells = [
            name,
            *(said([value]) for value in means),
            said([float(values.max()) for values in golds]),
            said([float(values[peak]) for values, peak in zip(kls, peaks, strict=True)]),
            said([float(values[-1]) for values in kls]),
            said([float(values[-1]) for values in golds]),
            said([float(values.max() - values[-1]) for values in golds]),
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    lines += ["", "Gold above that of one model, by seed, at the same KL and after the same number of updates:", ""]
    lines += [f"| reward | {' | '.join(f'KL {kl:g}' for kl in KLS)} | the end |", f"|---|{'---|' * (len(KLS) + 1)}"]
    for name in list(WAYS)[1:]:
        gains = [said([at(one[name], kl) - at(one["one model"], kl) for one in of_seeds], "+.1f") for kl in KLS]
        ends = [float(smooth(one[name], "gold")[-1] - smooth(one["one model"], "gold")[-1]) for one in of_seeds]
        gains.append(said(ends, "+.1f"))
        lines.append(f"| {name} | {' | '.join(gains)} |".replace("-", "−"))
    return lines


def main() -> int:
    """Train what is missing, write the page's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    torch.set_num_threads(1)
    found: list[dict[str, list[dict[str, float]]]] = []
    for folder in parser.parse_args().runs:
        run, of_ways = RunFolder(folder), {}
        for name in WAYS:
            of_ways[name] = train(run, name)
            last = of_ways[name][-1]
            print(f"{folder.name}, {name}: gold {last['gold']:.2f}, KL {last['kl']:.1f} at the end", flush=True)
        found.append(of_ways)
    made = "\n".join(["", *table(found), ""])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_text(PAGE, f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{after}")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
