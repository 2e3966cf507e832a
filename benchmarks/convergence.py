"""PPO and DPO against the exact optimum, on a space small enough to enumerate.

    python benchmarks/convergence.py                 # all cases, one after the other; writes docs/verification.md
    python benchmarks/convergence.py --methods ppo-1x1 --seeds 0 --betas 0.5
    python benchmarks/convergence.py --report        # docs/verification.md from the results so far

Three prompts, 40 responses each (up to three of the words a, b, c, ended by EOS or by the budget), fixed random
rewards, a tiny Llama as reference. The KL-regularised optimum is pi*(y|x) = p(y|x) exp(r(x,y)/beta) / Z(x), and J* =
beta log Z (mean over prompts). The real `PPOTrainer` samples, scores through a Python reward function and learns; the
real DPO trainer, as the dpo stage builds it, learns from Bradley-Terry pairs. Then the trained policy is enumerated:
J is exact.

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

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from artifacts.files import append_jsonl, read_jsonl, write_text  # noqa: E402
from models.logprobs import pad_batch, response_logprobs  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "convergence.jsonl"
WORDS, EOS, BUDGET = ("a", "b", "c"), 3, 3
# Largest (J* - J) / (J* - J_ref) for PPO, largest KL(pi || pi*) for DPO at beta 0.5.
BARS = {"ppo-1x1": 0.01, "ppo-4x4": 0.05, "dpo-1e5": 0.01, "dpo-1e6": 0.002}


class Space:
    """Every prompt and every response, with rewards drawn from N(0, 1).

    Args:
        seed: of the rewards and of the reference's weights.
    """

    def __init__(self, seed: int, spread: float = 0.15):
        generator = np.random.default_rng(seed)
        # The end token comes first: attention over a, a, a alone could not tell how many there are.
        self.prompts = [[EOS, 0], [EOS, 1], [EOS, 2]]
        ended = [[*words, EOS] for n in range(BUDGET) for words in itertools.product(range(3), repeat=n)]
        cut = [list(words) for words in itertools.product(range(3), repeat=BUDGET)]
        self.responses = ended + cut
        self.rewards = generator.normal(size=(len(self.prompts), len(self.responses)))
        self.tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        self.reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=8,
                initializer_range=spread,
                bos_token_id=None,
                eos_token_id=EOS,
                pad_token_id=EOS,
            )
        )
        self.log_reference = self.log_probabilities(self.reference)
        # What a completion's text says about it: the words. A response that was cut has one word more than any that
        # ended.
        names = [" ".join(WORDS[t] for t in ids if t != EOS) for ids in self.responses]
        self.index = {name: number for number, name in enumerate(names)}

    def policy(self) -> LlamaForCausalLM:
        """A copy of the reference, to be trained."""
        model = LlamaForCausalLM(self.reference.config)
        model.load_state_dict(self.reference.state_dict())
        return model

    @torch.no_grad()
    def log_probabilities(self, model) -> np.ndarray:
        """Exact log pi(y | x), ``(prompts, responses)``."""
        pairs = list(itertools.product(self.prompts, self.responses))
        batch = pad_batch([p for p, _ in pairs], [r for _, r in pairs], EOS)
        logprobs, _ = response_logprobs(model.eval(), batch)
        return logprobs.double().sum(1).numpy().reshape(len(self.prompts), len(self.responses))

    def reward(self, prompts, completions, **columns) -> list[float]:
        """The reward as PPO sees it: from texts."""
        return [
            float(self.rewards[WORDS.index(prompt), self.index[" ".join(completion.split())]])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def optimum(self, beta: float) -> tuple[np.ndarray, float]:
        """log pi* and J*."""
        tilted = self.log_reference + self.rewards / beta
        log_z = np.logaddexp.reduce(tilted, axis=1, keepdims=True)
        return tilted - log_z, float(beta * log_z.mean())

    def measure(self, model, beta: float) -> dict[str, float]:
        """Exact distance of a policy from the optimum.

        Returns:
            ``gap`` = (J* - J) / (J* - J_ref), ``kl`` = KL(pi || pi*), ``kl_reverse`` = KL(pi* || pi), nats, means over
            prompts; ``kl_start`` = KL(ref || pi*).
        """
        log_pi = self.log_probabilities(model)
        if abs(np.exp(log_pi).sum(1) - 1).max() > 1e-5:
            raise ArithmeticError("the probabilities of all responses do not sum to 1: the space is not all there is")
        best, top = self.optimum(beta)

        def kl(a, b):
            return float((np.exp(a) * (a - b)).sum(1).mean())

        def objective(log_p):
            return float((np.exp(log_p) * self.rewards).sum(1).mean()) - beta * kl(log_p, self.log_reference)

        start = objective(self.log_reference)
        return {
            "gap": (top - objective(log_pi)) / (top - start),
            "kl": kl(log_pi, best),
            "kl_reverse": kl(best, log_pi),
            "kl_start": kl(self.log_reference, best),
        }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words a, b, c and an end token that is also the padding: pad == eos must not matter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def run_ppo(space: Space, beta: float, epochs: int, minibatches: int, updates: int, seed: int, batch: int, lr: float):
    """Train with the real trainer; returns the policy."""
    from ppo.config import PPOConfig
    from ppo.trainer import PPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=space.policy(),
            reward_funcs=space.reward,
            train_dataset=Dataset.from_dict({"input_ids": space.prompts}),
            processing_class=space.tokenizer,
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
                learning_rate=lr,
                value_learning_rate=lr,
                vf_coef=0.5,
                cliprange_value=None,
                max_grad_norm=1.0,
                logging_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                diagnose=False,
            ),
        )
        trainer.train()
        return trainer.policy


def bradley_terry_pairs(space: Space, n: int, seed: int) -> Dataset:
    """Fixed pairs: prompts and two different responses drawn from a mix of reference and uniform, labels drawn once.

    The optimum does not depend on how pairs are drawn as long as every response occurs (papers: O2.2); the uniform
    part makes sure that it does.
    """
    generator = np.random.default_rng(seed + 1000)
    rows = generator.integers(len(space.prompts), size=n)
    count = len(space.responses)
    mixed = 0.5 * np.exp(space.log_reference) + 0.5 / count
    cumulative = np.cumsum(mixed / mixed.sum(1, keepdims=True), axis=1)
    first, second = (np.minimum((generator.random(n)[:, None] > cumulative[rows]).sum(1), count - 1) for _ in range(2))
    second = np.where(first == second, (second + 1 + generator.integers(count - 1, size=n)) % count, second)
    margin = space.rewards[rows, first] - space.rewards[rows, second]
    wins = generator.random(n) < 1 / (1 + np.exp(-margin))
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    return Dataset.from_dict(
        {
            "prompt_ids": [space.prompts[i] for i in rows],
            "chosen_ids": [space.responses[i] for i in chosen],
            "rejected_ids": [space.responses[i] for i in rejected],
        }
    )


def run_dpo(space: Space, beta: float, pairs: int, seed: int, batch: int, epochs: float, lr: float):
    """Train with the trainer that the dpo stage builds; returns the policy."""
    from trl.trainer.dpo_config import DPOConfig

    from dpo.train import build_trainer

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


# Settings of the cases. One epoch of one minibatch tests rewards, GAE and the gradient, with a ratio of 1; four
# epochs of four minibatches let the clip act.
PPO_SETTINGS = {
    "ppo-1x1": {"epochs": 1, "minibatches": 1, "updates": 450, "batch": 512, "lr": 2e-3},
    "ppo-4x4": {"epochs": 4, "minibatches": 4, "updates": 100, "batch": 512, "lr": 1e-3},
}
DPO_SETTINGS = {
    "dpo-1e5": {"pairs": 10**5, "batch": 1000, "epochs": 4, "lr": 2e-3},
    "dpo-1e6": {"pairs": 10**6, "batch": 4000, "epochs": 2, "lr": 2e-3},
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
    seconds = time.process_time() - started
    machine = f"{platform.machine()}, torch {torch.__version__}"
    measured = space.measure(policy, beta)
    return {"method": method, "seed": seed, "beta": beta, **measured, "cpu_seconds": seconds, "machine": machine}


def report(rows: list[dict]) -> str:
    """docs/verification.md."""
    ppo = [row for row in rows if row["method"].startswith("ppo")]
    dpo = [row for row in rows if row["method"].startswith("dpo")]
    order = {method: number for number, method in enumerate(BARS)}

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

    machines = "; ".join(sorted({row["machine"] for row in rows})) or "no case has been run yet"
    missing = [
        f"{method} seed {seed} beta {beta}"
        for method, seed, beta in cases(list(BARS), list(range(5)), [0.1, 0.2, 0.5])
        if not any((r["method"], r["seed"], r["beta"]) == (method, seed, beta) for r in rows)
    ]
    not_run = f"Not run yet ({len(missing)}): {'; '.join(missing)}." if missing else "All cases were run."
    return f"""# Verification: PPO and DPO against the exact optimum

Written by `python benchmarks/convergence.py` ({machines}; one thread, fp32). Every
figure is exact: the space has 120 sequences (three prompts, 40 responses each), and the trained policy is enumerated.

For every policy J* - J(pi) = beta KL(pi || pi*), so the gap below, (J* - J) / (J* - J_ref), is 0 at the optimum and 1
at the reference. KL in nats. The trainers are the ones users run: real sampling, a reward function on decoded text,
padding equal to EOS.

| | worst | bar |
|---|---|---|
| PPO, 1 epoch x 1 minibatch: gap | {worst("ppo-1x1", "gap")} | {BARS["ppo-1x1"]} |
| PPO, 4 epochs x 4 minibatches: gap | {worst("ppo-4x4", "gap")} | {BARS["ppo-4x4"]} |
| DPO, 100,000 pairs, beta 0.5: KL(pi, pi*) | {worst("dpo-1e5", "kl")} | {BARS["dpo-1e5"]} |
| DPO, 1,000,000 pairs, beta 0.5: KL(pi, pi*) | {worst("dpo-1e6", "kl")} | {BARS["dpo-1e6"]} |

{not_run}

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
| closed forms of GAE, rewards, KL estimators, losses, whitening, controllers | `tests/ppo/test_algorithm.py` |
| parity with TRL 1.12: rewards, advantages, returns, losses, weights after an update, 1e-5 |
`benchmarks/parity_trl.py` | | recorded numbers of TRL 1.12; summarize-from-feedback worked by hand |
`tests/ppo/test_parity.py` | | gradient accumulation 1 x 16, 2 x 8, 8 x 2 give one update, 1e-6 |
`tests/ppo/test_trainer.py` | | kill -9 at five random points, bit-identical end | `tests/ppo/test_resume.py` |
| two processes give the run of one | `tests/ppo/test_distributed.py` |
"""


def cases(methods: list[str], seeds: list[int], betas: list[float]) -> list[tuple[str, int, float]]:
    """All cases; DPO's bars are for beta 0.5."""
    return [
        (method, seed, beta)
        for method in methods
        for seed, beta in itertools.product(seeds, betas)
        if method.startswith("ppo") or (beta == 0.5 and (method == "dpo-1e5" or seed == 0))
    ]


def main() -> int:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(BARS), choices=list(BARS))
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
        figure = row["gap"] if row["method"].startswith("ppo") else row["kl"]
        within = figure <= BARS[row["method"]]
        failed += not within
        print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if arguments.results == RESULTS:
        write_text(ROOT / "docs" / "verification.md", report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
