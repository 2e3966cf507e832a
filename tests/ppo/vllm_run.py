"""PPO with vLLM as its engine, in a process of its own: `python -m tests.ppo.vllm_run MODEL FOLDER KIND`.

`test_engine_vllm.py` starts it with a Python that has vLLM. KIND is `full` or `lora`. Prints one line of JSON: the log
of each update, from the fifth on with an engine whose weights are no longer updated, and draws with the same seeds.
"""

import json
import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from tests.ppo.conftest import PROMPTS, count_good

SYNCED, STALE = 4, 2


class StopSynchronising(TrainerCallback):
    """From one update on the engine keeps the weights it has."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == SYNCED:
            self.trainer.roles.engine.update_weights = lambda model: None


def main(model: str, folder: str, kind: str) -> None:
    """Train, draw, and print."""
    stop = StopSynchronising()
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        model=model,
        reward_funcs=count_good,
        args=PPOConfig(
            output_dir=folder, generation_engine="vllm", max_steps=SYNCED + STALE, rollout_batch_size=32,
            response_length=12, learning_rate=2e-3, lr_scheduler_type="constant", num_ppo_epochs=2, num_mini_batches=2,
            check_first_ratio=False, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            diagnose=False, seed=7,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        # Not the class that belongs to the architecture, which would read the files otherwise.
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
        peft_config=lora if kind == "lora" else None,
        callbacks=[stop],
    )  # fmt: skip
    stop.trainer = trainer
    trainer.train()
    prompts, seeds = trainer.prompts.ids[:8], list(range(8))
    draws = [trainer.roles.engine.generate(prompts, trainer.args.sampling(), seeds) for _ in range(2)]
    draws.append(trainer.roles.engine.generate(prompts[::-1], trainer.args.sampling(), seeds[::-1])[::-1])
    draws.append(trainer.roles.engine.generate(prompts, trainer.args.sampling(), [seed + 100 for seed in seeds]))
    report = {
        "log": [row for row in trainer.state.log_history if "episode" in row],
        "draws": [[one.token_ids for one in draw] for draw in draws],
        "finished": [one.finished for one in draws[0]],
        "eos": trainer.roles.eos_ids,
        "budget": trainer.args.sampling().max_new_tokens,
    }
    sys.stdout.write(f"\n{json.dumps(report)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
