"""Our PPO beside TRL 1.12's, the last release that had one: the same models, rollouts and settings, number by number.

    python benchmarks/parity_trl.py                  # installs trl==1.12.0 into a throw-away folder
    python benchmarks/parity_trl.py --trl FOLDER     # or takes one installed there (pip install --no-deps --target
    FOLDER) python benchmarks/parity_trl.py --record         # also renews tests/ppo/trl_parity.json

Prints the largest difference of log-probabilities, values, rewards, advantages, returns, losses and of all weights
after an update of four epochs; exits with 1 where one exceeds 1e-5. Conventions are switched to TRL's by
``parity="trl-1.12"``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOLERANCE = 1e-5
ROWS, BUDGET, VOCABULARY, PAD, EOS = 16, 9, 24, 0, 2
TENSORS = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
# One update of four epochs each: the plain case, and the other estimator with whitened rewards.
CASES = {
    "k1": {"kl_estimator": "k1", "whiten_rewards": False},
    "k3, whitened rewards": {"kl_estimator": "k3", "whiten_rewards": True},
}
SHARED = {
    "kl_coef": 0.05,
    "missing_eos_penalty": 1.0,
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "total_episodes": ROWS,
    "response_length": BUDGET,
    "temperature": 0.7,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 1,
}


def make_models(folder: Path) -> None:
    """Four tiny Llamas (wide initial weights, so that probabilities are far from uniform) and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(VOCABULARY - 3)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    for seed, name in enumerate(("policy", "reference", "value", "reward")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.3, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
            num_labels=1,
        )  # fmt: skip
        kind = LlamaForCausalLM if name in ("policy", "reference") else LlamaForSequenceClassification
        model = kind(config)
        if name == "reference":
            # Near the policy, as a reference is: exp(log ratio) of unrelated models would be hundreds.
            torch.manual_seed(0)
            model = kind(config)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor += 0.03 * torch.randn(tensor.shape)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def make_rollouts(folder: Path) -> None:
    """Fixed prompts of 2 to 6 tokens and responses of 1 to 9: some end at once, some never."""
    generator = torch.Generator().manual_seed(7)

    def words(n):
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    rows = []
    for number in range(ROWS):
        length = [0, 1, 3, 5, 8, BUDGET][number % 6]
        response = words(length) + ([EOS] if length < BUDGET else [])
        # The first token is the row's number: every prompt is another.
        rows.append({"prompt": [3 + number, *words(1 + number % 5)], "response": response})
    (folder / "rollouts.json").write_text(json.dumps(rows))


def read_rollouts(folder: Path) -> dict[tuple[int, ...], list[int]]:
    """Responses by prompt."""
    rows = json.loads((folder / "rollouts.json").read_text())
    return {tuple(row["prompt"]): row["response"] for row in rows}


def store(folder: Path, who: str, case: str, prompts: list[list[int]], tensors: dict, losses: dict, weights: dict):
    """Write what one side computed, rows in the order of the rollout file."""
    order = list(read_rollouts(folder))
    rows = [prompts.index(list(prompt)) for prompt in order]
    ordered = {name: tensors[name][rows].detach().clone().contiguous() for name in TENSORS}
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    torch.save({"tensors": ordered, "losses": losses, "weights": weights}, folder / f"{who}-{case}.pt")


def run_trl(folder: Path, case: str) -> None:
    """TRL's trainer, its generation replaced by the fixed responses, its loop looked into while it whitens."""
    import inspect

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    responses = read_rollouts(folder)
    seen: dict[str, torch.Tensor] = {}
    whiten = ppo_trainer.masked_whiten

    def fixed_generation(model, queries, batch_size, pad_token_id, generation_config):
        rows = [responses[tuple(query[query != PAD].tolist())] for query in queries]
        padded = torch.tensor([row + [PAD] * (BUDGET - len(row)) for row in rows])
        both = torch.cat([queries, padded], 1)
        logits = ppo_trainer.forward(model, both, PAD).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / (SHARED["temperature"] + 1e-7)

    def watching_whiten(values, mask, shift_mean=True):
        out = whiten(values, mask, shift_mean)
        local = inspect.currentframe().f_back.f_locals
        if shift_mean:  # the call for advantages, the last one of the rollout
            names = ("queries", "logprobs", "ref_logprobs", "values", "scores", "rewards", "returns")
            seen.update({name: local[name].clone() for name in names})
            seen["advantages"] = out.masked_fill(local["padding_mask"], 0)
        return out

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = fixed_generation, watching_whiten
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    load = AutoModelForCausalLM.from_pretrained
    score = AutoModelForSequenceClassification.from_pretrained
    data = Dataset.from_dict({"input_ids": [list(prompt) for prompt in responses]})
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"), stop_token="eos", num_sample_generations=0, **{**SHARED, **CASES[case]}
        ),
        processing_class=tokenizer,
        model=load(folder / "policy"),
        ref_model=load(folder / "reference"),
        reward_model=score(folder / "reward", num_labels=1),
        value_model=score(folder / "value", num_labels=1),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    ppo_trainer.masked_whiten = whiten
    logged = trainer.state.log_history[-1]
    losses = {name: logged[name] for name in ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg")}
    prompts = [query[query != PAD].tolist() for query in seen["queries"]]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {
        **{f"policy.{name}": p for name, p in model.policy.named_parameters()},
        **{f"value_model.{name}": p for name, p in model.value_model.named_parameters()},
    }
    store(folder, "trl", case, prompts, seen, losses, weights)


def run_ours(folder: Path, case: str) -> None:
    """Our trainer on the same responses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from ppo_vs_dpo.models.sampling.generation import Generated
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    responses = read_rollouts(folder)
    load = AutoModelForCausalLM.from_pretrained
    score = AutoModelForSequenceClassification.from_pretrained
    trainer = PPOTrainer(
        model=load(folder / "policy"),
        ref_model=load(folder / "reference"),
        reward_model=score(folder / "reward", num_labels=1),
        value_model=score(folder / "value", num_labels=1),
        args=PPOConfig(
            output_dir=str(folder / "ours"), parity="trl-1.12", max_grad_norm=0.0, diagnose=False,
            **{**SHARED, **CASES[case]},
        ),
        train_dataset=Dataset.from_dict({"input_ids": [list(prompt) for prompt in responses]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )  # fmt: skip
    collect, kept = trainer.collect, {}

    def fixed(prompt_ids, sampling, seeds):
        rows = [responses[tuple(ids)] for ids in prompt_ids]
        return [Generated(row, row[-1] == EOS) for row in rows]

    def keep(update, clock=None):
        kept["rollout"] = collect(update, clock)
        return kept["rollout"]

    trainer.roles.engine.generate, trainer.collect = fixed, keep
    trainer.train()
    rollout = kept["rollout"]
    logged = next(row for row in trainer.state.log_history if "loss/policy_avg" in row)
    losses = {name: logged[name] for name in ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg")}
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    tensors = {name: getattr(rollout, name) for name in TENSORS}
    tensors["scores"] = rollout.final_scores
    # TRL writes 1.0 at padded log-probabilities; it is masked there in both.
    for name in ("logprobs", "ref_logprobs"):
        tensors[name] = torch.where(rollout.mask, tensors[name], 1.0)
    store(folder, "ours", case, prompts, tensors, losses, dict(trainer.model.named_parameters()))


def compare(folder: Path, case: str) -> dict[str, float]:
    """Largest absolute differences between the two sides."""
    ours, theirs = (torch.load(folder / f"{who}-{case}.pt", weights_only=True) for who in ("ours", "trl"))
    out = {name: (ours["tensors"][name] - theirs["tensors"][name]).abs().max().item() for name in TENSORS}
    out.update({name: abs(ours["losses"][name] - theirs["losses"][name]) for name in ours["losses"]})
    if ours["weights"].keys() != theirs["weights"].keys():
        raise SystemExit("the two sides trained different tensors")
    out["weights after the update"] = max(
        (ours["weights"][name] - theirs["weights"][name]).abs().max().item() for name in ours["weights"]
    )
    return out


def record(folder: Path) -> Path:
    """Keep TRL's numbers for the test that needs no network."""
    content = {
        "made by": "python benchmarks/parity_trl.py --record (trl==1.12.0)",
        "settings": {"gamma": 1.0, "lam": 0.95, **{k: SHARED[k] for k in ("kl_coef", "missing_eos_penalty")}},
        "rollouts": json.loads((folder / "rollouts.json").read_text()),
        "cases": {},
    }
    for case, settings in CASES.items():
        theirs = torch.load(folder / f"trl-{case}.pt", weights_only=True)["tensors"]
        content["cases"][case] = {**settings, **{name: theirs[name].tolist() for name in TENSORS}}
    path = Path(__file__).parents[1] / "tests" / "ppo" / "trl_parity.json"
    path.write_text(json.dumps(content) + "\n")
    return path


def main() -> int:
    """Run both sides and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="folder with trl==1.12.0 installed")
    parser.add_argument("--record", action="store_true", help="renew tests/ppo/trl_parity.json")
    parser.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        for case in CASES:
            (run_trl if arguments.side == "trl" else run_ours)(Path(arguments.folder), case)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, site = Path(temporary), arguments.trl or f"{temporary}/site"
        if not arguments.trl:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, "trl==1.12.0"]
            subprocess.run(install, check=True)
        make_models(folder)
        make_rollouts(folder)
        root = str(Path(__file__).parents[1])
        for side, path in (("trl", site), ("ours", root)):
            env = {**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--side", side, "--folder", temporary]
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=temporary)
            if done.returncode:
                sys.stderr.write(done.stdout[-2000:] + done.stderr[-4000:])
                return 1
        worst = 0.0
        for case in CASES:
            print(f"{case}: largest absolute difference between our PPO and TRL 1.12's (fp32)")
            for name, difference in compare(folder, case).items():
                print(f"  {name:26s} {difference:.1e}")
                worst = max(worst, difference)
        print(f"within {TOLERANCE:g}: {'yes' if worst <= TOLERANCE else 'NO'}")
        if arguments.record:
            print(f"recorded in {record(folder).name}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
