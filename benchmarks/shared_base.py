"""PPO with adapters: one base for four roles beside four separate models; samples/s and peak memory of an update.

    python -m benchmarks.shared_base MODEL [--rounds 2] [--rows 8] [--micro-rows 1]

Two processes of one thread take turns, as in `benchmarks.ppo_vs_trl`: the same prompts, settings and adapters (policy
and value model train them; the reward model is an adapter of its own; the reference is the bare base).
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.memory import save_reward_adapter, targets

EPOCHS, RANK = 4, 16
NUMBERS = ("rounds", "rows", "micro-rows", "prompt-tokens", "new-tokens")


def roles(kind: str, path: str, reward: Path) -> dict:
    """The trainer's models in one arrangement."""
    from peft import AutoPeftModelForSequenceClassification, get_peft_model

    from ppo_vs_dpo.models.loading.config import LoraSettings
    from ppo_vs_dpo.models.loading.pretrained import load_policy
    from ppo_vs_dpo.ppo.roles.shared import share_base

    lora = LoraSettings(r=RANK, alpha=2 * RANK, target_modules=targets(path))
    if kind == "shared":
        policy, value_model, scorer = share_base(load_policy(path), lora, reward, "reward_model")
        return {"model": policy, "value_model": value_model, "reward_model": scorer}
    scalar = AutoPeftModelForSequenceClassification.from_pretrained
    return {
        "model": get_peft_model(load_policy(path), lora.peft_config("CAUSAL_LM")),
        "value_model": scalar(reward, num_labels=1, is_trainable=True),
        "reward_model": scalar(reward, num_labels=1),
        "ref_model": load_policy(path),
    }


def worker(kind: str, given: argparse.Namespace) -> None:
    """One side: train, a turn an update."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    turns, steps = measure.Turns(), given.rounds + 1

    class StepEnd(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.ready()

        def on_step_end(self, args, state, control, **kwargs):
            turns.done(last=state.global_step >= steps, samples=given.rows)

    tokenizer, draw = load_tokenizer(given.model), random.Random(0)
    ids = [[draw.randrange(100, len(tokenizer) - 100) for _ in range(given.prompt_tokens)] for _ in range(given.rows)]
    with tempfile.TemporaryDirectory() as folder:
        PPOTrainer(
            args=PPOConfig(
                output_dir=folder, per_device_train_batch_size=given.micro_rows,
                gradient_accumulation_steps=given.rows // given.micro_rows,
                local_rollout_forward_batch_size=given.micro_rows, total_episodes=steps * given.rows,
                num_ppo_epochs=EPOCHS, num_mini_batches=1, response_length=given.new_tokens, save_strategy="no",
                report_to="none", use_cpu=True, disable_tqdm=True, diagnose=False, seed=1,
            ),
            processing_class=tokenizer, train_dataset=Dataset.from_dict({"input_ids": ids}), callbacks=[StepEnd()],
            **roles(kind, given.model, Path(given.reward)),
        ).train()  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a causal language model")
    for name, default in (("rounds", 2), ("rows", 8), ("prompt-tokens", 32), ("new-tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-rows", type=int, default=1, help="of one pass: activations are on top of the models")
    parser.add_argument("--side", choices=("separate", "shared"), help=argparse.SUPPRESS)
    parser.add_argument("--reward", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.side:
        return worker(given.side, given)
    from ppo_vs_dpo.models.loading.config import LoraSettings

    print(measure.machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lora = LoraSettings(r=RANK, alpha=2 * RANK, target_modules=targets(given.model))
        save_reward_adapter(given.model, lora, Path(folder))
        sizes = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in NUMBERS]
        line = ["-m", "benchmarks.shared_base", given.model, *sizes, f"--reward={folder}"]
        sides = [measure.Side(name, [*line, f"--side={name}"], [str(measure.ROOT)]) for name in ("separate", "shared")]
        steps = measure.alternate(sides, given.rounds)
    rows = [
        [side.name, f"{given.rows / measure.median(steps[side.name], 'seconds'):.3f}", f"{side.loaded['memory']:.0f}",
         f"{max(step['peak'] for step in steps[side.name]):.0f}"]
        for side in sides
    ]  # fmt: skip
    print(measure.table(["models", "samples/s", "MiB before the first update", "peak MiB"], rows))
    pairs = measure.ratios(steps["separate"], steps["shared"])
    print(measure.bar("one base, samples/s over separate", statistics.median(pairs), 1.0))
    peak = {name: max(step["peak"] for step in one) for name, one in steps.items()}
    print(measure.bar("one base, peak memory over separate", peak["shared"] / peak["separate"], 0.4, at_most=True))


if __name__ == "__main__":
    main()
