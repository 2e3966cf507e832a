"""Our PPO beside TRL 1.12's, the last release that had one: samples/s, memory, phases, and the share of the floor.

    python -m benchmarks.ppo_vs_trl                 # both workloads; installs trl==1.12.0 into a throw-away folder
    python -m benchmarks.ppo_vs_trl --trl FOLDER --only real --rounds 2
    python -m benchmarks.ppo_vs_trl --scaling            # seconds at four numbers of responses and of tokens

The same 6 M-parameter Llamas (four roles), prompts, rollout size, epochs, micro-batch rows and optimizer on both
sides, one thread each; the two take turns within one run. ``fixed``: prompts of equal length and no EOS, so that
there is nothing to skip. ``real``: prompts of 8 to 96 tokens, responses that end by EOS after a third of the budget on
average: a bias on EOS gives every token the same chance to be the last, and both sides get the same lengths, 32
quantiles of that distribution in another order at each update. Seconds are CPU seconds.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import floor, measure

VOCABULARY, PAD, BOS, EOS = 4096, 0, 1, 2
SHAPE = floor.Shape(hidden=256, intermediate=688, layers=5, vocabulary=VOCABULARY)
EPOCHS = 4
# Of one pass of ours at most; TRL's passes are counted in rows.
TOKENS = 1024


@dataclass
class Workload:
    """What is sampled: rows per update, prompt lengths, budget, mean response length (``None``: no EOS)."""

    rows: int
    prompts: tuple[int, int]
    budget: int
    mean: float | None
    micro: int = 32
    epochs: int = EPOCHS


WORKLOADS = {
    "fixed": Workload(32, (32, 32), 64, None),
    "real": Workload(32, (8, 96), 64, 64 / 3),
    # Each is twice the one before, in responses or in tokens.
    **{f"responses-{n}": Workload(n, (32, 32), 32, None, 16, 1) for n in (16, 32, 64, 128)},
    **{f"tokens-{n}": Workload(16, (n // 2, n // 2), n // 2, None, 16, 1) for n in (64, 128, 256, 512)},
}
BARS = {"fixed": 1.5, "real": 3.0}


def hazard(mean: float, budget: int) -> float:
    """The chance to end at each token that gives responses of at most ``budget`` tokens a mean length of ``mean``."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - (1 - middle) ** budget) / middle > mean else (low, middle)
    return low


def planned_lengths(workload: Workload, update: int) -> list[int]:
    """Response lengths of an update: the quantiles of the distribution, shuffled; ``budget`` and more never ended."""
    chance = hazard(workload.mean, workload.budget)
    quantiles = [(row + 0.5) / workload.rows for row in range(workload.rows)]
    lengths = [math.ceil(math.log1p(-share) / math.log1p(-chance)) for share in quantiles]
    random.Random(update).shuffle(lengths)
    return lengths


def models(workload: Workload, shape: floor.Shape = SHAPE, heads: int = 4) -> tuple:
    """Policy, reference, reward and value model, equal on both sides, and the tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(shape.vocabulary - 3)]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=heads, max_position_embeddings=1024, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, num_labels=1, tie_word_embeddings=False,
    )  # fmt: skip
    made = []
    for seed, kind in enumerate([LlamaForCausalLM] * 2 + [LlamaForSequenceClassification] * 2):
        # The reference starts as the policy is.
        torch.manual_seed(max(seed, 1))
        model = kind(config)
        if kind is LlamaForCausalLM:
            head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=True)
            with torch.no_grad():
                head.weight.copy_(model.lm_head.weight)
                head.bias.zero_()
                # Near-uniform logits: a log-odds of the hazard over the other tokens; the pad token never comes.
                chance = hazard(workload.mean, workload.budget) if workload.mean else 0.0
                odds = chance / (1 - chance) * (shape.vocabulary - 2)
                head.bias[EOS] = torch.tensor(odds).log() if odds else -1e4
                head.bias[PAD] = -1e4
            model.lm_head = head
        made.append(model)
    return (*made, fast)


def prompt_ids(workload: Workload) -> list[list[int]]:
    """Random prompts."""
    draw = random.Random(0)
    lengths = [draw.randint(*workload.prompts) for _ in range(4 * workload.rows)]
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def settings(workload: Workload, steps: int) -> dict:
    """Settings of both trainers."""
    return {
        "per_device_train_batch_size": workload.micro, "gradient_accumulation_steps": workload.rows // workload.micro,
        "num_ppo_epochs": workload.epochs, "num_mini_batches": 1, "total_episodes": steps * workload.rows,
        "response_length": workload.budget, "temperature": 1.0, "kl_coef": 0.05, "missing_eos_penalty": 1.0,
        "learning_rate": 3e-6, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 1,
        "local_rollout_forward_batch_size": workload.rows,
    }  # fmt: skip


def step_end(turns: measure.Turns, steps: int, figures):
    """A callback that hands the turn back after every update."""
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.ready()

        def on_step_end(self, args, state, control, **kwargs):
            turns.done(last=state.global_step >= steps, **figures())

    return StepEnd()


def planned_generation(workload: Workload, generate):
    """``generate`` of transformers, such that responses have the planned lengths (one call an update)."""
    from transformers import LogitsProcessor

    class Planned(LogitsProcessor):
        def __init__(self, lengths: list[int]):
            self.lengths, self.step = torch.tensor(lengths), 0

        def __call__(self, input_ids, scores):
            self.step += 1
            scores[:, EOS] = torch.where(self.lengths.to(scores.device) == self.step, 1e4, -1e4)
            return scores

    updates = itertools.count()

    def planned(*args, **kwargs):
        return generate(*args, logits_processor=[Planned(planned_lengths(workload, next(updates)))], **kwargs)

    return planned


def run_trl(workload: Workload, steps: int, folder: str, bf16: bool) -> None:
    """TRL's side."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    turns, seen = measure.Turns(), {}
    policy, reference, reward, value, tokenizer = models(workload)
    if workload.mean:
        policy.generate = planned_generation(workload, policy.generate)
    forward = ppo_trainer.forward

    def watched(model, query_responses, pad_token_id):
        if not torch.is_grad_enabled():
            return forward(model, query_responses, pad_token_id)
        if "score" not in turns.phases:
            turns.phases["score"] = turns.elapsed() - turns.phases["generate"]
        return forward(model, query_responses, pad_token_id)

    def truncated(stop_token_id, pad_token_id, responses):
        kept = truncate(stop_token_id, pad_token_id, responses)
        seen["responses"] = [*seen.get("responses", []), *(kept != PAD).sum(1).tolist()]
        return kept

    def figures() -> dict:
        turns.phases["train"] = turns.elapsed() - turns.phases["generate"] - turns.phases["score"]
        return {"samples": workload.rows, "responses": seen.pop("responses")}

    truncate, ppo_trainer.truncate_response = ppo_trainer.truncate_response, truncated
    ppo_trainer.forward = watched
    ppo_trainer.batch_generation = turns.timed("generate", ppo_trainer.batch_generation)
    data = Dataset.from_dict({"input_ids": prompt_ids(workload)})
    kwargs = {**settings(workload, steps), "bf16": bf16}
    PPOTrainer(
        args=PPOConfig(output_dir=folder, stop_token="eos", num_sample_generations=0, **kwargs),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=data, eval_dataset=data, callbacks=[step_end(turns, steps, figures)],
    ).train()  # fmt: skip


def planned_uniforms(workload: Workload, steps: int, uniforms):
    """The generator's random numbers, such that responses have the planned lengths.

    A number picks the token where the cumulative distribution reaches it, and EOS is the third token: 0.01 picks it
    (its chance is 0.03 to 0.05), 0.2 and more picks another.
    """
    from ppo_vs_dpo.models.sampling.generation import row_seed

    planned = {
        row_seed(1, "rollout", update, position): length
        for update in range(steps)
        for position, length in enumerate(planned_lengths(workload, update))
    }

    def drawn(seeds, length):
        numbers = 0.2 + 0.8 * uniforms(seeds, length)
        for row, seed in enumerate(seeds):
            if planned[seed] <= length:
                numbers[row, planned[seed] - 1] = 0.01
        return numbers

    return drawn


def our_trainer(workload: Workload, steps: int, folder: str, bf16: bool, callbacks: list):
    """Our side's trainer, in a process whose responses have the planned lengths from now on."""
    from datasets import Dataset

    from ppo_vs_dpo.models.sampling import generation
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    if workload.mean:
        generation.uniform_rows = planned_uniforms(workload, steps, generation.uniform_rows)
    policy, reference, reward, value, tokenizer = models(workload)
    return PPOTrainer(
        args=PPOConfig(
            output_dir=folder, missing_eos="subtract", micro_batch_tokens=TOKENS, logprobs_from_sampling=True,
            **{**settings(workload, steps), "bf16": bf16},
        ),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids(workload)}),
        callbacks=callbacks,
    )  # fmt: skip


def run_ours(workload: Workload, steps: int, folder: str, bf16: bool) -> None:
    """Our side."""
    turns, seen = measure.Turns(), {}

    def figures() -> dict:
        turns.phases["score"] = turns.elapsed() - turns.phases["generate"] - turns.phases["train"]
        return {"samples": workload.rows, **seen}

    trainer = our_trainer(workload, steps, folder, bf16, [step_end(turns, steps, figures)])
    update = turns.timed("train", trainer.update)

    def watched(rollout, number):
        seen["prompts"], seen["responses"] = rollout.prompt_mask.sum(1).tolist(), rollout.lengths().tolist()
        return update(rollout, number)

    engine = trainer.roles.engine
    engine.generate, trainer.update = turns.timed("generate", engine.generate), watched
    trainer.train()


def start(side: str, workload: str, steps: int, trl: str | None, bf16: bool = False) -> measure.Side:
    """A worker of one side."""
    command = ["-m", "benchmarks.ppo_vs_trl", "--side", side, "--only", workload, "--rounds", str(steps - 1)]
    path = [trl, str(measure.ROOT)] if side == "trl" else [str(measure.ROOT)]
    return measure.Side(side, command + ["--bf16"] * bf16, path)


def compare(name: str, rounds: int, trl: str, bf16: bool) -> None:
    """Both sides on one workload: print the table and the bars."""
    workload = WORKLOADS[name]
    sides = [start(side, name, rounds + 1, trl, bf16 and side == "ours") for side in ("trl", "ours")]
    steps = measure.alternate(sides, rounds)
    rate, band = measure.matmul_rate(), measure.bandwidth()
    ours, theirs = steps["ours"], steps["trl"]
    # Equal on both sides; the floor is of these.
    for one, other in zip(ours, theirs, strict=True):
        assert sorted(one["responses"]) == sorted(other["responses"]), "the two sides sampled other lengths"
    needed = []
    for step in ours:
        counted = floor.update(SHAPE, step["prompts"], step["responses"], workload.epochs)
        needed.append({
            "generate": counted["generate"] / rate + counted["bytes"] / band,
            "score": counted["score"] / rate, "train": counted["train"] / rate,
        })  # fmt: skip
    total = sorted(sum(one.values()) for one in needed)[len(needed) // 2]
    rows = []
    for who, side in (("TRL 1.12", theirs), ("ours", ours)):
        label = f"{who}{', bf16' if bf16 and who == 'ours' else ''}"
        lengths = [length for step in side for length in step["responses"]]
        seconds = measure.median(side, "seconds")
        rows.append([
            label, f"{workload.rows / seconds:.2f}", f"{seconds:.1f}",
            *[f"{measure.median(side, 'phases.' + phase):.2f}" for phase in ("generate", "score", "train")],
            f"{100 * total / seconds:.0f} %", f"{max(step['peak'] for step in side):.0f}",
            f"{max(step['peak'] for step in side) - sides[who == 'ours'].loaded['memory']:.0f}",
            f"{sum(lengths) / len(lengths):.1f}",
        ])  # fmt: skip
    middle = needed[len(needed) // 2]
    phases = [f"{middle[phase]:.2f}" for phase in ("generate", "score", "train")]
    rows.append(["floor", f"{workload.rows / total:.2f}", f"{total:.1f}", *phases, "100 %", "", "", ""])
    print(f"\n### PPO, `{name}`: {workload.rows} responses an update, {workload.epochs} epochs\n")
    head = "side, samples/s, s/update, generate, score, train, share of floor, peak MiB, of it working, mean response"
    print(measure.table(head.split(", "), rows))
    pairs = sorted(measure.ratios(theirs, ours))
    print(f"\nrates of this run: {rate / 1e9:.0f} GFLOP/s (fp32 matmul), {band / 1e9:.1f} GB/s read")
    print(f"pairs: {', '.join(f'{pair:.2f}' for pair in pairs)}; wall/CPU seconds of ours "
          f"{measure.median(ours, 'wall') / measure.median(ours, 'seconds'):.2f}\n")  # fmt: skip
    wanted = 5.0 if bf16 and name == "real" else BARS[name]
    print(measure.bar(f"{name}, samples/s over TRL's", statistics.median(pairs), wanted))
    peak = [max(step["peak"] for step in side) for side in (ours, theirs)]
    print(measure.bar(f"{name}, peak memory over TRL's", peak[0] / peak[1], 0.6, at_most=True))
    work = [one - side.loaded["memory"] for one, side in zip(peak, reversed(sides), strict=True)]
    print(
        f"- {name}, working memory (peak less what is held before the first step) over TRL's: {work[0] / work[1]:.2f}"
    )
    if name == "fixed":
        print(measure.bar("fixed, share of the floor", total / measure.median(ours, "seconds"), 0.5))
    sys.stdout.flush()


def scaling(rounds: int) -> None:
    """Seconds of one update of ours at four numbers of responses and four numbers of tokens a response."""
    for kind, counts in (("responses", (16, 32, 64, 128)), ("tokens", (64, 128, 256, 512))):
        rows = []
        for count in counts:
            workload = WORKLOADS[f"{kind}-{count}"]
            steps = measure.alternate([start("ours", f"{kind}-{count}", rounds + 1, None)], rounds)["ours"]
            tokens = workload.rows * (workload.prompts[0] + workload.budget)
            seconds = measure.median(steps, "seconds")
            rows.append([str(workload.rows), str(tokens // workload.rows), f"{seconds:.2f}",
                         f"{1e3 * seconds / tokens:.3f}", f"{max(s['peak'] for s in steps):.0f}"])  # fmt: skip
        print(f"\n### Cost of one update (1 epoch) in {kind}\n")
        print(measure.table(["responses", "tokens each", "s/update", "ms/token", "peak MiB"], rows), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="folder with trl==1.12.0 installed")
    parser.add_argument("--only", choices=list(WORKLOADS), help="one workload")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each side")
    parser.add_argument("--scaling", action="store_true", help="ours alone at four sizes")
    parser.add_argument("--bf16", action="store_true", help="ours in bf16 (TRL stays fp32)")
    parser.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        run = run_trl if arguments.side == "trl" else run_ours
        with tempfile.TemporaryDirectory() as folder:
            run(WORKLOADS[arguments.only], arguments.rounds + 1, folder, arguments.bf16)
        return
    print(measure.machine(), flush=True)
    if arguments.scaling:
        return scaling(arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        trl = arguments.trl or measure.install_trl("1.12.0", str(Path(folder) / "site"))
        for name in [arguments.only] if arguments.only else ["fixed", "real"]:
            compare(name, arguments.rounds, trl, arguments.bf16)


if __name__ == "__main__":
    main()
