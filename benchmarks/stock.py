"""The stages of `benchmarks.road` as one would write them with the libraries alone.

python -m benchmarks.stock STAGE FOLDER        # road calls it: a stage is a process
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a batch in the loops.
ROWS = 64
# Of the held-out pairs, at most: measured under each policy, and read by the reward model (as ours does).
MEASURED, CHECKED = 128, 256
SIDES = ("chosen", "rejected")


def section(run: Path, stage: str, cls: type) -> dict[str, Any]:
    """The settings of a stage that are fields of a library's argument class, and what a CPU needs."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.load(run / "config.yaml")[stage], resolve=True)
    known = {field.name for field in dataclasses.fields(cls)}
    passed = {key: value for key, value in settings.items() if key in known and value is not None}
    return {**passed, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 1}


def rows_of(run: Path, table: str, *columns: str):
    """A table of the run, as a data set in memory."""
    from datasets import Dataset

    return Dataset.from_parquet(str(run / f"{table}.parquet"), columns=list(columns), keep_in_memory=True)


def text_of(tokenizer, prompt, answer=None) -> str:
    """A prompt as the model reads it, or with an answer: texts as they are, messages by the chat template."""
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return prompt + (answer_of(answer) if answer else "")


def answer_of(answer) -> str:
    """An answer's text."""
    return answer if isinstance(answer, str) else answer[0]["content"]


def read_alike(tokenizer, rows):
    """Rows whose messages are texts, so that TRL's trainers read the tokens that ours read.

    Handed messages they render conversations whole, and train at what a chat template writes after the token that ends
    the answer (a line break, mostly); ours ends with that token. Texts they end with it themselves.
    """
    if isinstance(rows[0]["prompt"], str):
        return rows
    answers = [name for name in ("completion", "chosen", "rejected") if name in rows.column_names]
    return rows.map(
        lambda row: {
            "prompt": text_of(tokenizer, row["prompt"]),
            **{name: answer_of(row[name]) for name in answers},
        },
        remove_columns=rows.column_names,
    )


def stock_sft(run: Path, out: Path) -> dict[str, float]:
    """TRL's SFTTrainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(out / "init")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "init"),
        args=SFTConfig(str(out / "sft"), **section(run, "sft", SFTConfig)),
        train_dataset=read_alike(tokenizer, rows_of(run, "data/sft_train", "prompt", "completion")),
        processing_class=tokenizer,
    )
    return trained(trainer)


def stock_reward_model(run: Path, out: Path) -> dict[str, float]:
    """TRL's RewardTrainer, then scores of the test pairs: its accuracy."""
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    model = AutoModelForSequenceClassification.from_pretrained(out / "sft", num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(out / "reward_model"), **section(run, "reward_model", RewardConfig)),
        train_dataset=read_alike(tokenizer, rows_of(run, "pairs/train", "prompt", "chosen", "rejected")),
        processing_class=tokenizer,
    )
    figures = trained(trainer)
    test = rows_of(run, "pairs/test", "prompt", "chosen", "rejected")
    limit = OmegaConf.load(run / "config.yaml").reward_model.test_pairs
    test = test.select(range(min(len(test), limit or len(test))))
    sides = [
        scores_of(model, tokenizer, [text_of(tokenizer, row["prompt"], row[side]) for row in test], [True] * len(test))
        for side in ("chosen", "rejected")
    ]
    return {**figures, "accuracy": sum(a > b for a, b in zip(*sides, strict=True)) / len(test)}


def stock_dpo(run: Path, out: Path) -> dict[str, float]:
    """TRL's DPOTrainer, with a reference model beside the policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = {**section(run, "dpo", DPOConfig), "precompute_ref_log_probs": False}
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "sft"),
        ref_model=AutoModelForCausalLM.from_pretrained(out / "sft"),
        args=DPOConfig(str(out / "dpo"), **settings),
        train_dataset=read_alike(tokenizer, rows_of(run, "pairs/train", "prompt", "chosen", "rejected")),
        processing_class=tokenizer,
    )
    return trained(trainer)


def stock_ppo(run: Path, out: Path) -> dict[str, float]:
    """The PPOTrainer of TRL 1.12."""
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from ppo_vs_dpo.ppo.config import PPOConfig as Ours

    ours = OmegaConf.load(run / "config.yaml").ppo
    tokenizer = AutoTokenizer.from_pretrained(out / "sft", padding_side="left")
    prompts = rows_of(run, "data/prompts_train", "prompt")
    data = prompts.map(
        lambda rows: {"input_ids": tokenizer([text_of(tokenizer, one) for one in rows["prompt"]])["input_ids"]},
        batched=True,
    ).select_columns(["input_ids"])
    lengths: list[int] = []
    truncate = ppo_trainer.truncate_response

    def truncated(stop_token_id, pad_token_id, responses):
        kept = truncate(stop_token_id, pad_token_id, responses)
        lengths.extend((kept != pad_token_id).sum(1).tolist())
        return kept

    ppo_trainer.truncate_response = truncated
    # What the run does not set has our default, not TRL's: adam_epsilon, value clipping.
    defaults = {field.name: field.default for field in dataclasses.fields(Ours) if field.name in Ours.__annotations__}
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    settings = {key: value for key, value in defaults.items() if key in known} | section(run, "ppo", PPOConfig)
    rollout = int(ours.rollout_batch_size)
    micro_batches = rollout // int(settings["per_device_train_batch_size"])
    settings |= {
        "gradient_accumulation_steps": micro_batches,
        "total_episodes": int(ours.max_steps) * rollout, "stop_token": "eos", "num_sample_generations": 0,
    }  # fmt: skip
    settings.pop("max_steps")
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(out / "reward_model")  # noqa: E731
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(out / "ppo"), **settings), processing_class=tokenizer, train_dataset=data,
        model=AutoModelForCausalLM.from_pretrained(out / "sft"), reward_model=scalar(), value_model=scalar(),
        ref_model=AutoModelForCausalLM.from_pretrained(out / "sft"), eval_dataset=data.select(range(8)),
    )  # fmt: skip
    # As it is, it steps once in gradient_accumulation_steps passes, however many minibatches these are of.
    trainer.accelerator.gradient_accumulation_steps = max(1, micro_batches // int(settings["num_mini_batches"]))
    trainer.train()
    trainer.save_model(str(out / "ppo"))
    tokenizer.save_pretrained(out / "ppo")
    kl = trainer.state.log_history[-1]["objective/kl"]
    return {"responses": len(lengths), "tokens": sum(lengths) / len(lengths), "kl of the last rollout": kl}


def stock_compare(run: Path, out: Path, more: bool = False) -> dict[str, float]:
    """Completions by ``generate``, scores by the reward model and by gold where there is one, KL, win rates.

    With ``more`` what else ours asks the models: log-probabilities of held-out pairs under each policy, KL over the
    whole vocabulary, and in how many of these pairs the reward model is right.
    """
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from ppo_vs_dpo.preferences.testbed.gold import gold_reward

    config = OmegaConf.load(run / "config.yaml")
    settings = config.compare
    tokenizer = AutoTokenizer.from_pretrained(out / "sft", padding_side="left")
    prompts = rows_of(run, "data/prompts_heldout", "prompt")["prompt"][: settings.n_prompts]
    prompts = [text_of(tokenizer, prompt) for prompt in prompts]
    reward = AutoModelForSequenceClassification.from_pretrained(out / "reward_model")
    reference = AutoModelForCausalLM.from_pretrained(out / "sft")
    judged, figures, count, tokens = {}, {}, 0, 0
    pairs = rows_of(run, "pairs/test", "prompt", "chosen", "rejected") if more else []
    sides = [[(text_of(tokenizer, row["prompt"]), answer_of(row[side])) for row in pairs] for side in SIDES]
    if more:
        both = [
            scores_of(reward, tokenizer, [p + a for p, a in side[:CHECKED]], [True] * len(side[:CHECKED]))
            for side in sides
        ]
        figures["accuracy"] = sum(a > b for a, b in zip(*both, strict=True)) / len(both[0])
    for name in ("sft", "ppo", "dpo"):
        policy = AutoModelForCausalLM.from_pretrained(out / name)
        wanted = list(prompts) * (settings.baseline_draws if name == "sft" else 1)
        texts, finished, kl = [], [], []
        for batch in batches(wanted):
            enc = tokenizer(batch, return_tensors="pt", padding=True)
            with torch.no_grad():
                ids = policy.generate(
                    enc["input_ids"], attention_mask=enc["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
                    max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
                start = enc["input_ids"].shape[1]
                new = ids[:, start:]
                ended = new == tokenizer.eos_token_id
                real = (ended.cumsum(1) - ended.long()) == 0
                mask = torch.cat([enc["attention_mask"], real.long()], 1)
                ours, theirs = (logprobs(model, ids, mask, start, more) for model in (policy, reference))
                kl += (((ours.exp() * (ours - theirs)).sum(-1) if more else ours - theirs) * real).sum(1).tolist()
            tokens += int(real.sum())
            count += len(batch)
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            finished += ended.any(1).tolist()
        scores = scores_of(reward, tokenizer, [p + t for p, t in zip(wanted, texts, strict=True)], finished)
        judged[name] = gold_reward(wanted, texts, finished=finished) if config.data.gold else scores
        figures[f"kl {name}"] = sum(kl) / len(kl)
        if more:
            likely = [pair_logprobs(policy, tokenizer, side[:MEASURED]) for side in sides]
            figures |= {f"{side} {name}": sum(one) / len(one) for side, one in zip(SIDES, likely, strict=True)}
    n = len(prompts)
    for name in ("ppo", "dpo"):
        pairs = list(zip(judged[name], judged["sft"][:n], strict=True))
        figures[f"win {name}"] = sum((a > b) + (a == b) / 2 for a, b in pairs) / n
    return {**figures, "responses": count, "tokens": tokens / count}


def batches(rows: list[str]) -> Iterator[list[str]]:
    """`ROWS` at a time."""
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def logprobs(model, ids, mask, start: int, whole: bool = False):
    """Log-probabilities of the tokens from ``start`` on, ``(B, T)``; ``whole``: of the vocabulary, ``(B, T, V)``."""
    import torch

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
    found = torch.log_softmax(logits, -1)
    return found if whole else found.gather(2, ids[:, start:, None])[..., 0]


def pair_logprobs(model, tokenizer, side: list[tuple[str, str]]) -> list[float]:
    """Log-probabilities of whole answers to their prompts, EOS included."""
    import torch

    found: list[float] = []
    for batch in batches(side):
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in batch]
        answers = [
            tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for _, answer in batch
        ]
        enc = tokenizer.pad({"input_ids": [p + a for p, a in zip(prompts, answers, strict=True)]}, return_tensors="pt")
        ids, asked = enc["input_ids"], torch.zeros_like(enc["input_ids"])
        for row, answer in enumerate(answers):
            asked[row, -len(answer) :] = 1
        with torch.no_grad():
            found += (logprobs(model, ids, enc["attention_mask"], 1) * asked[:, 1:]).sum(1).tolist()
    return found


def scores_of(model, tokenizer, texts: list[str], finished: list[bool]) -> list[float]:
    """The reward model's scores, a batch at a time."""
    import torch

    found: list[float] = []
    ends = [text + tokenizer.eos_token * end for text, end in zip(texts, finished, strict=True)]
    for batch in batches(ends):
        enc = tokenizer(batch, return_tensors="pt", padding=True)
        with torch.no_grad():
            found += model(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"]).logits[:, 0].tolist()
    return found


def trained(trainer) -> dict[str, float]:
    """Train, save, and give the mean loss and the number of steps."""
    summary = trainer.train().metrics
    trainer.save_model()
    return {"steps": trainer.state.global_step, "train_loss": summary["train_loss"]}


STOCK = {
    "sft": stock_sft, "reward_model": stock_reward_model, "dpo": stock_dpo, "ppo": stock_ppo, "compare": stock_compare,
    "compare_more": functools.partial(stock_compare, more=True),
}  # fmt: skip


def first_weights(run: Path, out: Path) -> None:
    """The weights and the tokenizer that our SFT stage starts from, saved for stock."""
    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.artifacts.stage import StageContext
    from ppo_vs_dpo.models.training import model_settings
    from ppo_vs_dpo.sft.train import initial_policy

    context = StageContext(RunFolder(run), "sft")
    model, tokenizer = initial_policy(context, model_settings(context))
    model.save_pretrained(out / "init")
    tokenizer.save_pretrained(out / "init")


def main() -> None:
    """One stage, or the first weights."""
    import torch

    torch.set_num_threads(1)
    stage, out = sys.argv[1], Path(sys.argv[2])
    run = out / "ours" / "road"
    if stage == "init":
        return first_weights(run, out)
    (out / f"stock-{stage}.json").write_text(json.dumps(STOCK[stage](run, out)))
    return None


if __name__ == "__main__":
    main()
