"""How far this project is from plain transformers and TRL on one architecture, as one number a measure.

Every function builds its models by itself and gives the largest absolute difference (of steps: see `_step_apart`). In
fp32 a few units of the last place add up; `in_double` shows that what is left is rounding.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ppo_vs_dpo.dpo.train import build_trainer as build_dpo
from ppo_vs_dpo.models.loading.adapters import merge
from ppo_vs_dpo.models.loading.prepared import disable_dropout
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes.answers import answers
from ppo_vs_dpo.models.passes.logprobs import (
    backbone,
    full_kl,
    pad_batch,
    response_logprobs,
    response_values,
    score_head_of,
)
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.given import value_model_from
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from ppo_vs_dpo.reward_model.train import build_trainer as build_reward
from ppo_vs_dpo.sft.train import build_trainer as build_sft
from tests.conftest import build_word_tokenizer
from tests.matrix.tiny import WITHOUT_VALUES, settings_of, tiny

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13], [3, 3, 4, 4, 5, 5, 6], [14, 15, 16, 17]]
RESPONSES = [[5, 6, 2], [7], [8, 9, 10, 11, 12, 2], [3, 2], [4, 5, 6], [2]]
REJECTED = [[8, 2], [9, 9, 9, 2], [7, 2], [3, 16, 17, 18], [2], [14, 2]]
BETA = 0.3


class _AllInDouble(TorchFunctionMode):
    """What asks for fp32 gets fp64: models' own casts, and this project's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """All arithmetic inside the block in fp64, whatever the code says."""
    torch.set_default_dtype(torch.float64)
    try:
        with _AllInDouble():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def policy_of(name: str, seed: int = 0) -> torch.nn.Module:
    """A policy without dropout, in the arithmetic of the moment."""
    model = _in_this_arithmetic(tiny(name, seed).to(torch.get_default_dtype()))
    disable_dropout(model)
    return model


def _in_this_arithmetic(model: torch.nn.Module) -> torch.nn.Module:
    if torch.get_default_dtype() == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products know no fp64
    return model


def scalar_model_of(name: str) -> torch.nn.Module:
    """A model of the architecture with a scalar head, weights large enough that every mistake shows."""
    torch.manual_seed(2)
    config = AutoConfig.for_model(name, **{**settings_of(name), "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.get_default_dtype())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    disable_dropout(model)
    return _in_this_arithmetic(model).eval()


def plain(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-softmax ``(R, V)`` before each response token, from transformers' own pass over one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def _largest(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)


# --- passes ----------------------------------------------------------------------------------------------
def sampling(name: str) -> float:
    """Log-probabilities and entropies that sampling with a cache reports, against one pass over each row."""
    model = policy_of(name)
    seeds = list(range(len(PROMPTS)))
    drawn = generate(model, PROMPTS, SamplingConfig(10), eos_token_ids=[2, 19], seeds=seeds, with_logprobs=True)
    assert len({len(one.token_ids) for one in drawn}) > 1  # rows leave the batch
    pairs = []
    for prompt, one in zip(PROMPTS, drawn, strict=True):
        expected = plain(model, prompt, one.token_ids)
        picked = expected.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        pairs.append((torch.tensor(one.logprobs), picked))
        pairs.append((torch.tensor(one.entropy), -(expected.exp() * expected).sum(-1)))
    return _largest(pairs)


def logprobs(name: str) -> float:
    """Log-probabilities, entropies and the exact KL of a padded (packed) batch, against one pass over each row."""
    model, other = policy_of(name), policy_of(name, seed=1)
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    found, entropy = response_logprobs(model, batch, with_entropy=True)
    kl, pairs = full_kl(model, other, batch), []
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ours, theirs, n = plain(model, prompt, response), plain(other, prompt, response), len(response)
        pairs.append((found[row, :n], ours.gather(1, torch.tensor(response)[:, None])[:, 0]))
        pairs.append((entropy[row, :n], -(ours.exp() * ours).sum(-1)))
        pairs.append((kl[row, :n], (ours.exp() * (ours - theirs)).sum(-1)))
    return _largest(pairs)


def values(name: str) -> float | None:
    """V(s_t) of a padded batch, against the head on transformers' own states of each row."""
    if name in WITHOUT_VALUES:
        return None
    model = value_model_from(None, policy_of(name)).eval()
    disable_dropout(model)
    head = score_head_of(model)
    torch.manual_seed(3)
    torch.nn.init.normal_(head.weight, std=0.25)
    pairs = []
    with torch.no_grad():
        found = response_values(model, pad_batch(PROMPTS, RESPONSES, 0))
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            states = backbone(model)(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state
            expected = torch.nn.functional.linear(states, head.weight)[0, len(prompt) - 1 : -1, 0]
            pairs.append((found[row, : len(response)], expected))
    return _largest(pairs)


def scores(name: str) -> float | None:
    """Scores of a batch, against ``model(**inputs).logits`` of each row."""
    if name in WITHOUT_VALUES:
        return None
    model = scalar_model_of(name)
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    found = RewardScorer(model, build_word_tokenizer(), batch_size=4).score_sequences(rows)
    with torch.no_grad():
        own = [model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits for row in rows]
    return _largest([(torch.tensor(found), torch.cat(own).squeeze(-1))])


# --- one step --------------------------------------------------------------------------------------------
class _PlainDPO(DPOTrainer):
    """TRL's own, on token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _PlainReward(RewardTrainer):
    """TRL's own, on token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def _arguments(cls: type, folder: str, **more):
    return cls(
        output_dir=folder, per_device_train_batch_size=len(PROMPTS), max_steps=1, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, report_to="none", save_strategy="no",
        logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=3, **more,
    )  # fmt: skip


def _stepped(trainer) -> tuple[dict[str, torch.Tensor], float, float]:
    """The weights before a step less those after it, the loss and the norm of the gradient."""
    trainer.remove_callback(PrinterCallback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    row = next(row for row in trainer.state.log_history if "grad_norm" in row)
    moved = {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}
    return moved, row["loss"], row["grad_norm"]


def _step_apart(one: tuple, other: tuple) -> float:
    """Two steps of one model: their losses, and gradients and their norms relative to the largest there is."""
    (ours, loss, norm), (theirs, right_loss, right_norm) = one, other
    assert ours.keys() == theirs.keys()
    largest = max(float(step.abs().max()) for step in theirs.values())
    assert largest > 0
    steps = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest
    return max(abs(loss - right_loss), abs(norm - right_norm) / right_norm, steps)


def _pairs() -> Dataset:
    return Dataset.from_dict({"prompt_ids": PROMPTS, "chosen_ids": RESPONSES, "rejected_ids": REJECTED})


def sft(name: str) -> float:
    """A step of SFT against TRL's ``SFTTrainer`` (with the router's loss, where the configuration asks for it)."""
    rows = {
        "input_ids": [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)],
        "labels": [[-100] * len(p) + r for p, r in zip(PROMPTS, RESPONSES, strict=True)],
    }
    done, tokenizer = [], build_word_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        for build in (build_sft, lambda m, t, d, a: SFTTrainer(m, a, train_dataset=d, processing_class=t)):
            args = _arguments(SFTConfig, folder, dataset_kwargs={"skip_prepare_dataset": True})
            done.append(_stepped(build(policy_of(name), tokenizer, Dataset.from_dict(rows), args)))
    return _step_apart(*done)


def reward(name: str) -> float | None:
    """A step of the reward model against TRL's ``RewardTrainer``."""
    if name in WITHOUT_VALUES:
        return None
    tokenizer, done = build_word_tokenizer(), []
    whole = {
        k: [p + r for p, r in zip(PROMPTS, v, strict=True)]
        for k, v in (("chosen_ids", RESPONSES), ("rejected_ids", REJECTED))
    }

    def plain_trainer(model, tokenizer, dataset, args):
        return _PlainReward(model, args, train_dataset=Dataset.from_dict(whole), processing_class=tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        for build in (build_reward, plain_trainer):
            model = scalar_model_of(name)
            model.config.pad_token_id = tokenizer.pad_token_id
            done.append(_stepped(build(model, tokenizer, _pairs(), _arguments(RewardConfig, folder))))
    return _step_apart(*done)


def dpo(name: str) -> float:
    """A step of DPO, away from its reference, against TRL's ``DPOTrainer``."""
    tokenizer, done = build_word_tokenizer(), []

    def ours(model, args):
        return build_dpo(model, tokenizer, _pairs(), args, reference=policy_of(name, seed=1))

    def theirs(model, args):
        return _PlainDPO(model, policy_of(name, seed=1), args, train_dataset=_pairs(), processing_class=tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        for build in (ours, theirs):
            done.append(_stepped(build(policy_of(name), _arguments(DPOConfig, folder, beta=BETA))))
    return _step_apart(*done)


def count(prompts, completions, **columns) -> list[float]:
    """A reward that any text has."""
    return [float(len(text.split()) + text.split().count("good")) for text in completions]


def ppo_trainer(name: str, folder: str, lora: bool = False, **more) -> PPOTrainer:
    """PPO on the architecture: one update of one step over one rollout."""
    parts: dict = {}
    if name in WITHOUT_VALUES:
        torch.manual_seed(0)
        config = LlamaConfig(**{**settings_of("llama"), "num_labels": 1})
        parts["value_model"] = AutoModelForSequenceClassification.from_config(config).to(torch.get_default_dtype())
    if lora:
        # PEFT refuses the output projection of these, whose kernels skip it.
        layers = ["in_proj", "q_proj"] if name in ("mamba", "mamba2", "falcon_h1") else "all-linear"
        parts["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=layers)
    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=16, rollout_batch_size=16, max_steps=1, num_ppo_epochs=1,
        num_mini_batches=1, response_length=8, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=1.0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, diagnose=False,
        seed=7, **more,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": PROMPTS})
    trainer = PPOTrainer(
        policy_of(name),
        reward_funcs=count,
        args=args,
        train_dataset=rows,
        processing_class=build_word_tokenizer(),
        **parts,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.value_model is not None:
        torch.manual_seed(4)
        head = score_head_of(trainer.value_model.get_base_model() if lora else trainer.value_model)
        with torch.no_grad():
            for weight in head.parameters():
                weight.normal_(0, 0.25)
    return trainer


def ppo(name: str) -> float:
    """A step of PPO against its loss written out row by row: -A rho + vf_coef (V - R)^2 / 2, a mean over tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_trainer(name, folder)
        kept, collect = [], trainer.collect
        trainer.collect = lambda *args: kept.append(collect(*args)) or kept[-1]
        roles = {"policy.": trainer.policy, "value_model.": trainer.value_model}
        before = {name: {n: p.detach().clone() for n, p in m.named_parameters()} for name, m in roles.items()}
        trainer.train()
        moved = {r + n: before[r][n] - p.detach() for r, m in roles.items() for n, p in m.named_parameters()}
        figures = next(row for row in trainer.state.log_history if "loss/grad_norm" in row)
        for role, model in roles.items():
            for n, parameter in model.named_parameters():
                parameter.data.copy_(before[role][n])
                parameter.grad = None
        rollout, args = kept[0], trainer.args
        tokens, surrogate, error = rollout.mask.sum(), 0.0, 0.0
        for row in range(len(rollout)):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
            real = rollout.mask[row]
            response = rollout.response_ids[row][real]
            ids, here = torch.tensor([[*prompt, *response.tolist()]]), slice(len(prompt) - 1, -1)
            logits = trainer.policy(input_ids=ids, use_cache=False).logits[0, here].float()
            picked = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            surrogate = surrogate - (rollout.advantages[row][real] * (picked - picked.detach()).exp()).sum()
            states = backbone(trainer.value_model)(input_ids=ids, use_cache=False).last_hidden_state[0, here]
            head = score_head_of(trainer.value_model)
            value = torch.nn.functional.linear(states, head.weight, head.bias)[:, 0]
            error = error + ((value - rollout.returns[row][real]) ** 2).sum() / 2
        loss = (surrogate + args.vf_coef * error) / tokens
        loss.backward()
        gradients = {r + n: p.grad for r, m in roles.items() for n, p in m.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        scale = min(1.0, args.max_grad_norm / (float(norm) + 1e-6))
        expected = {n: gradients[n] * scale if n in gradients else torch.zeros_like(moved[n]) for n in moved}
        seen = figures["loss/policy_avg"] + args.vf_coef * figures["loss/value_avg"]
        return _step_apart((moved, seen, figures["loss/grad_norm"]), (expected, float(loss), float(norm)))


# --- saving, adapters ------------------------------------------------------------------------------------
def saved(name: str) -> float:
    """A trained policy against its folder, loaded by transformers and by this project."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_trainer(name, folder)
        start = answers(trainer.policy)
        trainer.train()
        trainer.save_model(folder)
        after = answers(trainer.policy)
        assert (after - start).abs().max() > 1e-4
        loaded = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_policy(folder))
        return _largest([(answers(one), after) for one in loaded])


def adapters(name: str) -> float:
    """Adapters that PPO has trained against the model they merge into, and against that model's folder."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_trainer(name, folder, lora=True)
        start = answers(trainer.policy)
        trainer.train()
        trainer.save_model(folder)
        after = answers(trainer.policy)
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["r"] == 2
        assert (after - start).abs().max() > 1e-4
        assert torch.equal(answers(trainer.roles.reference.module), start)
        merged = merge(trainer.policy)
        pairs = [(answers(merged), after)]
        if torch.get_default_dtype() == torch.float64:
            return _largest(pairs)  # files are in fp32
        merged.save_pretrained(Path(folder) / "merged")
        again = AutoModelForCausalLM.from_pretrained(Path(folder) / "merged", dtype=torch.float32)
        return _largest([*pairs, (answers(again), after)])


# The columns of the table; ``None`` is what transformers has no model for, and is refused by name. What is saved is
# bit for bit what was trained: there is no rounding to tell apart in fp64.
MEASURES: dict[str, Callable[[str], float | None]] = {
    "sampling": sampling,
    "log-probabilities, KL": logprobs,
    "values": values,
    "scores": scores,
    "SFT step": sft,
    "reward step": reward,
    "DPO step": dpo,
    "PPO step": ppo,
    "saved": saved,
    "LoRA": adapters,
}
IN_DOUBLE = [name for name in MEASURES if name != "saved"]
