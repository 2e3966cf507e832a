"""PPO, its neighbours without a value model, and DPO against the exact optimum, on a space small enough to enumerate.

    python benchmarks/convergence.py                 # all cases, one after the other; writes docs/verification.md
    python benchmarks/convergence.py --methods ppo-1x1 --seeds 0 --betas 0.5
    python benchmarks/convergence.py --report        # docs/verification.md from the results so far

The space is that of `benchmarks.enumerable`. The real `PPOTrainer` samples, scores through a Python reward function on
decoded text and learns; the real DPO trainer, as the dpo stage builds it, learns from Bradley-Terry pairs. Then the
trained policy is enumerated: J is exact.
Results are appended to benchmarks/results/convergence.jsonl; a case that is there is not run again.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.enumerable import BUDGET, Space, bradley_terry_pairs  # noqa: E402
from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl, write_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "convergence.jsonl"
# Largest (J* - J) / (J* - J_ref) for what learns online, largest KL(pi || pi*) for DPO at beta 0.5.
BARS = {"ppo-1x1": 0.01, "ppo-4x4": 0.05, "rloo": 0.05, "grpo": 0.05, "reinforce_pp": 0.05}
BARS |= {"online_dpo": 0.05, "dpo-1e5": 0.01, "dpo-1e6": 0.002}


class Annealing(TrainerCallback):
    """Lowers the trainer's KL coefficient geometrically from ``start`` to ``end``, where it then stays.

    At a small beta a policy gradient runs into the first good response it meets, and hardly samples the others again:
    the gradient of a response is weighted by its own probability. Coming down from a large beta, every response that
    matters under pi* keeps being sampled.

    Args:
        start: the first coefficient.
        end: beta.
        updates: how many it takes.
    """

    def __init__(self, start: float, end: float, updates: float):
        self.start, self.end, self.updates = start, end, updates
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        share = min(1.0, state.global_step / self.updates)
        self.trainer.loop.kl.coef = self.start * (self.end / self.start) ** share


def run_ppo(
    space: Space,
    beta: float,
    epochs: int,
    minibatches: int,
    updates: int,
    seed: int,
    batch: int,
    lr: float,
    anneal: float = 0.0,
    **method: Any,
):
    """Train with the real trainer; returns the policy.

    Args:
        space: where.
        beta: the KL coefficient at the end.
        epochs: over each rollout.
        minibatches: of each epoch.
        updates: how many rollouts.
        seed: of sampling.
        batch: responses a rollout.
        lr: learning rate of policy and value model at first; it falls linearly to 0.
        anneal: share of the updates in which the coefficient falls from 1 to ``beta``.
        method: further settings: the estimator of the advantages, responses to a prompt.
    """
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    if method:
        rows = batch // len(space.prompts) // method["samples_per_prompt"]
    else:
        rows = batch // len(space.prompts)
        method = {"value_learning_rate": max(lr, 3e-3), "value_warmup_updates": min(5, updates // 10), "vf_coef": 0.5}
    annealing = [Annealing(1.0, beta, anneal * updates)] if anneal else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=space.policy(),
            reward_funcs=space.reward,
            # As many rows as a rollout: every prompt comes equally often in each.
            train_dataset=Dataset.from_dict({"input_ids": space.prompts * rows}),
            processing_class=space.tokenizer,
            callbacks=annealing,
            args=PPOConfig(
                output_dir=folder,
                seed=seed,
                max_steps=updates,
                rollout_batch_size=batch,
                per_device_train_batch_size=batch // minibatches,
                local_rollout_forward_batch_size=batch,
                generation_kwargs={"batch_size": batch},
                num_ppo_epochs=epochs,
                num_mini_batches=minibatches,
                response_length=BUDGET,
                missing_eos_penalty=None,
                kl_coef=beta,
                lam=1.0,
                learning_rate=lr,
                cliprange_value=None,
                max_grad_norm=1.0,
                logging_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                diagnose=False,
                **method,
            ),
        )
        for callback in annealing:
            callback.trainer = trainer
        trainer.train()
        return trainer.policy


def run_dpo(space: Space, beta: float, pairs: int, seed: int, batch: int, epochs: float, lr: float):
    """Train with the trainer that the dpo stage builds; returns the policy."""
    from trl.trainer.dpo_config import DPOConfig

    from ppo_vs_dpo.dpo.train import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            space.policy(),
            space.tokenizer,
            bradley_terry_pairs(space, pairs, seed),
            DPOConfig(
                output_dir=folder,
                seed=seed,
                beta=beta,
                per_device_train_batch_size=batch,
                precompute_ref_batch_size=batch,
                num_train_epochs=epochs,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
        )
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)


# One epoch of one minibatch tests rewards, GAE and gradient; four of four let the clip act.
PPO_SETTINGS = {
    "ppo-1x1": {"epochs": 1, "minibatches": 1, "updates": 400, "batch": 510, "lr": 2e-3, "anneal": 0.5},
    "ppo-4x4": {"epochs": 4, "minibatches": 4, "updates": 40, "batch": 516, "lr": 1e-3, "anneal": 0.4},
}
_ONCE = {"epochs": 1, "minibatches": 1, "updates": 300, "batch": 516, "lr": 2e-3, "anneal": 0.5}
PPO_SETTINGS |= {
    "rloo": {**_ONCE, "advantage": "rloo", "samples_per_prompt": 4},
    "grpo": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4, "updates": 600},
    "reinforce_pp": {**_ONCE, "advantage": "reinforce_pp", "samples_per_prompt": 1},
    "online_dpo": {**_ONCE, "loss": "dpo", "preference_labels": "bradley_terry", "samples_per_prompt": 2},
}
# Why GRPO has twice the updates of the others: one case of each, and the others' settings among them.
PROBES = {
    "grpo-as-rloo": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4},
    "grpo-lr-4e-3": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4, "lr": 4e-3},
    "grpo-lr-5e-4": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4, "lr": 5e-4},
    "grpo-3x-updates": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4, "updates": 900},
    "grpo-k-12": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 12, "batch": 1044},
    "dr-grpo": {**_ONCE, "advantage": "grpo", "samples_per_prompt": 4, "grpo_divide_by_std": False},
}
PROBED, PPO_SETTINGS = (1, 0.5), PPO_SETTINGS | PROBES
DPO_SETTINGS = {
    "dpo-1e5": {"pairs": 10**5, "batch": 1000, "epochs": 15, "lr": 1e-2},
    "dpo-1e6": {"pairs": 10**6, "batch": 2000, "epochs": 3, "lr": 1e-2},
}


def run_case(method: str, seed: int, beta: float) -> dict:
    """Run one case and measure it."""
    torch.set_num_threads(1)
    space = Space(seed)
    started = time.process_time()
    if method in PPO_SETTINGS:
        policy = run_ppo(space, beta, seed=seed, **PPO_SETTINGS[method])
    else:
        policy = run_dpo(space, beta, seed=seed, **DPO_SETTINGS[method])
    machine = f"{platform.machine()}, torch {torch.__version__}"
    about = {"cpu_seconds": time.process_time() - started, "machine": machine}
    return {"method": method, "seed": seed, "beta": beta, **space.measure(policy, beta), **about}


def figure_of(method: str) -> str:
    """Which figure a method's bar is for."""
    return "gap" if method in PPO_SETTINGS else "kl"


def report(rows: list[dict]) -> str:
    """docs/verification.md."""
    ppo = [row for row in rows if row["method"].startswith("ppo")]
    dpo = [row for row in rows if row["method"].startswith("dpo")]
    probes = [row for row in rows if row["method"] in PROBES]
    others = [row for row in rows if row not in (*ppo, *dpo, *probes)]
    order = {method: number for number, method in enumerate([*BARS, *PROBES])}

    def table(rows, head, cells):
        lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|"]
        for row in sorted(rows, key=lambda r: (order[r["method"]], r["beta"], r["seed"])):
            lines.append(f"| {' | '.join(cells(row))} |")
        return "\n".join(lines)

    def shared(row):
        return [f"{row['kl']:.1e}", f"{row['kl_reverse']:.1e}", f"{row['kl_start']:.2f}", f"{row['cpu_seconds']:.0f}"]

    def worst(method, figure):
        values = [row[figure] for row in rows if row["method"] == method]
        return f"{max(values):.1e} over {len(values)} cases" if values else "not run"

    def settings(method):
        of = PPO_SETTINGS[method].items()
        return ", ".join(f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in of)

    machines = "; ".join(sorted({row["machine"] for row in rows})) or "no case has been run yet"
    todo: dict[str, list[str]] = {}
    for method, seed, beta in cases([*BARS, *PROBES], list(range(5)), [0.1, 0.2, 0.5]):
        if not any((r["method"], r["seed"], r["beta"]) == (method, seed, beta) for r in rows):
            todo.setdefault(method, []).append(f"{seed} ({beta})")
    lines = "".join(f"\n* {method}, seed (beta): {', '.join(which)}" for method, which in todo.items())
    not_run = f"Not run yet:\n{lines}" if todo else "All cases were run."
    beyond = [r for r in rows if r["method"] in BARS and r[figure_of(r["method"])] > BARS[r["method"]]]
    over = [f"{r['method']} seed {r['seed']} beta {r['beta']}" for r in beyond]
    misses = f"Over the bar: {', '.join(over)}." if over else "No case is over its bar."
    return f"""# Verification: PPO and DPO against the exact optimum

Written by `python benchmarks/convergence.py` ({machines}; one thread, fp32). Every figure is exact: the space has 120
sequences (three prompts, 40 responses each), and the trained policy is enumerated.

For every policy J* - J(pi) = beta KL(pi || pi*), so the gap below, (J* - J) / (J* - J_ref), is 0 at the optimum and 1
at the reference. KL in nats. The trainers are the ones users run: real sampling, a reward function on decoded text,
padding equal to EOS.

| | worst | bar |
|---|---|---|
| PPO, 1 epoch x 1 minibatch: gap | {worst("ppo-1x1", "gap")} | {BARS["ppo-1x1"]} |
| PPO, 4 epochs x 4 minibatches: gap | {worst("ppo-4x4", "gap")} | {BARS["ppo-4x4"]} |
| RLOO, k = 4: gap | {worst("rloo", "gap")} | {BARS["rloo"]} |
| GRPO, k = 4: gap | {worst("grpo", "gap")} | {BARS["grpo"]} |
| REINFORCE++, k = 1: gap | {worst("reinforce_pp", "gap")} | {BARS["reinforce_pp"]} |
| online DPO, k = 2, Bradley-Terry labels: gap | {worst("online_dpo", "gap")} | {BARS["online_dpo"]} |
| DPO, 100,000 pairs, beta 0.5: KL(pi, pi*) | {worst("dpo-1e5", "kl")} | {BARS["dpo-1e5"]} |
| DPO, 1,000,000 pairs, beta 0.5: KL(pi, pi*) | {worst("dpo-1e6", "kl")} | {BARS["dpo-1e6"]} |

{misses} {not_run}

## PPO

{
        table(
            ppo,
            ["setting", "seed", "beta", "gap", "KL(pi, pi*)", "KL(pi*, pi)", "KL(ref, pi*)", "CPU s"],
            lambda r: [r["method"][4:], str(r["seed"]), f"{r['beta']}", f"{r['gap']:.1e}", *shared(r)],
        )
    }

With one epoch of one minibatch the ratio is 1 and the clip never acts: that setting tests rewards, advantages and
gradient. Four epochs of four minibatches let it act, at the price of a bias that the bar allows for.

Settings of 1 x 1: {settings("ppo-1x1")}.
Of 4 x 4: {settings("ppo-4x4")}.

In the first part of a run (`anneal`, a share of the updates) the KL coefficient falls from 1 to beta, and then stays
there. Without that, small betas stall: a policy gradient weighs each response by its own probability, so the policy
runs into the first good response and hardly samples the others again. On seed 0 at beta 0.1, 300 to 350 updates ended
at a gap of 0.020 without annealing and 0.010 with it; on a reference with larger initial weights (0.15 instead of 0.1)
at 0.16 and 0.008; on one with 0.3, where good responses have probabilities of 1e-4 and less, at 0.25 to 0.28 without.
Settings were chosen on seed 0; the other seeds are run once with them.

## Without a value model, and online DPO

{
        table(
            others,
            ["method", "seed", "beta", "gap", "KL(pi, pi*)", "KL(pi*, pi)", "KL(ref, pi*)", "CPU s"],
            lambda r: [r["method"], str(r["seed"]), f"{r['beta']}", f"{r['gap']:.1e}", *shared(r)],
        )
    }

Settings of RLOO: {settings("rloo")}.
Of GRPO: {settings("grpo")}.
Of REINFORCE++: {settings("reinforce_pp")}.
Of online DPO: {settings("online_dpo")}.

The KL penalty is in the reward (k1), also for GRPO: with k3 in the loss its fixed point is another. At pi* all
responses to a prompt have one and the same reward less penalty, beta log Z, so that RLOO's advantages, GRPO's (divided
by their spread or not) and online DPO's gradients are 0 there for every sample.

GRPO's division moves no fixed point, and it is the slower road to it. With d(y) what a response's reward less penalty
has above the mean, its expected advantage at the largest d is positive unless all d are equal: pi* is the only fixed
point of a policy that can be anything (`tests/ppo/rollouts/test_advantages_without_values.py` sums over all groups).
But no advantage is larger than (k - 1) / sqrt(k), 1.5 for k = 4, however much a response that is hardly ever sampled
is missing, and groups of responses that are all about right get advantages as large: their noise does not die out.
RLOO's and Dr. GRPO's does. The same case with more samples, or without the division:

{
        table(
            probes,
            ["method", "seed", "beta", "gap", "KL(pi, pi*)", "KL(pi*, pi)", "KL(ref, pi*)", "CPU s"],
            lambda r: [r["method"], str(r["seed"]), f"{r['beta']}", f"{r['gap']:.1e}", *shared(r)],
        )
    }

A smaller learning rate makes it worse, so it is not the noise of the last steps; more updates or larger groups make it
better, so it is no bias. GRPO therefore has twice the updates of the others: chosen after these cases, so on seed 1.

## DPO

{
        table(
            dpo,
            ["pairs", "seed", "beta", "gap", "KL(pi, pi*)", "KL(pi*, pi)", "KL(ref, pi*)", "CPU s"],
            lambda r: [r["method"][4:], str(r["seed"]), f"{r['beta']}", f"{r['gap']:.1e}", *shared(r)],
        )
    }

What remains with fixed pairs is the noise of their labels: it falls as one over their number.

## Other proofs

| what | where |
|---|---|
| closed forms of GAE, token rewards, whitening | `tests/ppo/algorithm/test_advantages.py` |
| closed forms of KL estimators and controllers | `tests/ppo/algorithm/test_kl.py` |
| losses and the score-function gradient | `tests/ppo/algorithm/test_losses.py` |
| TRL 1.12 beside ours: rewards, advantages, returns, losses, weights after an update | `benchmarks/parity_trl.py` |
| recorded numbers of TRL 1.12; summarize-from-feedback by its formulas | `tests/ppo/whole/test_parity.py` |
| 1 x 8, 2 x 4 and 8 x 1 give one update | `tests/ppo/whole/test_trainer.py` |
| kill -9 at five random points, bit-identical end | `tests/ppo/checkpoints/test_resume.py` |
| two processes give the run of one | `tests/ppo/whole/test_distributed.py` |
"""


def cases(methods: list[str], seeds: list[int], betas: list[float]) -> list[tuple[str, int, float]]:
    """All cases; DPO's bars are for beta 0.5, and a probe is one case."""
    return [
        (method, seed, beta)
        for method in methods
        for seed, beta in itertools.product(seeds, betas)
        if (method in PPO_SETTINGS and method not in PROBES)
        or (method in PROBES and (seed, beta) == PROBED)
        or (method in DPO_SETTINGS and beta == 0.5 and (method == "dpo-1e5" or seed == 0))
    ]


def main() -> int:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[*BARS, *PROBES], choices=[*BARS, *PROBES])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--betas", nargs="+", type=float, default=[0.1, 0.2, 0.5])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    rows = read_jsonl(arguments.results) if arguments.results.exists() else []
    done = {(row["method"], row["seed"], row["beta"]) for row in rows}
    failed = 0
    for case in [] if arguments.report else cases(arguments.methods, arguments.seeds, arguments.betas):
        if case in done:
            continue
        row = run_case(*case)
        append_jsonl(arguments.results, row)
        rows.append(row)
        within = row[figure_of(row["method"])] <= BARS.get(row["method"], float("inf"))
        failed += not within
        print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if arguments.results == RESULTS:
        write_text(ROOT / "docs" / "verification.md", report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
