"""The branch without a reward model: DPO (TRL's ``DPOTrainer``) on the pairs that the reward model learns from.

Reads ``sft/model`` (where training starts, and the reference) and ``pairs/``; writes ``dpo/model``.
"""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl.trainer.dpo_config import DPOConfig

from ppo_vs_dpo.artifacts.files import fingerprint_file
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.dpo.config import DPOStage, prepare_soft_labels, smoothed_loss
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.dpo.trainer import PairTrainer
from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.loading.prepared import train_in_full
from ppo_vs_dpo.models.loading.pretrained import context_length, load_policy, load_tokenizer
from ppo_vs_dpo.models.loading.quantized import quantization
from ppo_vs_dpo.models.loading.vocabulary import check_same_vocabulary
from ppo_vs_dpo.models.passes.answers import check_language_model
from ppo_vs_dpo.models.text.encoding import count_rows, left_out
from ppo_vs_dpo.models.text.trained_on import trained_on
from ppo_vs_dpo.models.training import callbacks, model_settings, save_model, train, training_arguments


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: DPOConfig,
    reference: PreTrainedModel | None = None,
    lora: LoraSettings | None = None,
    test: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
    reference_cache: Path | None = None,
    reference_id: str = "",
    starts_from_reference: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PairTrainer:
    """A trainer on models and data in memory.

    Args:
        model: the policy, where training starts.
        dataset: pairs from `dpo.data.dpo_dataset`, or texts in TRL's preference format.
        args: arguments; see `dpo.config.smoothed_loss` for cDPO.
        reference: another model than ``model``; ``None`` takes ``model`` as it is now: its log-probabilities are
            computed before the first step, or, with LoRA, with adapters off.
        test: pairs to evaluate on, in the same form.
        reference_cache: a folder that keeps reference log-probabilities between runs.
        reference_id: names the reference in that folder.
        starts_from_reference: ``reference`` is a copy of ``model``; without one it is so anyway.
        progress: of the reference's pass over the pairs: how many are read, of how many.

    Raises:
        UserError: policy and reference have different vocabularies.
    """
    check_language_model(model, tokenizer, "the policy")
    if reference is not None:
        check_language_model(reference, tokenizer, "the reference")
        check_same_vocabulary(model, reference)
    elif lora is None:
        args.precompute_ref_log_probs = True
    if "soft_label" in dataset.column_names:
        prepare_soft_labels(args)
    trainer = PairTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=dataset,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=lora.peft_config("CAUSAL_LM") if lora else None,
        callbacks=callbacks,
        reference_cache=reference_cache,
        reference_id=reference_id,
        starts_from_reference=reference is None or starts_from_reference,
        progress=progress,
    )
    train_in_full(trainer.model, trainer.is_deepspeed_enabled)
    return trainer


def run_stage(context: StageContext) -> None:
    """Run the stage."""
    settings, passed = split(context.config, DPOStage, DPOConfig, where="dpo")
    context.run.require("sft")
    pair_figures = context.run.require("pairs")["figures"]
    args = training_arguments(DPOConfig, context, smoothed_loss(passed))
    model_config = model_settings(context)

    # 1. The policy.
    folder = context.run.path("sft", "model")
    set_seed(context.seed)
    tokenizer = load_tokenizer(folder)
    base = quantization(settings.lora, model_config, context)
    model = load_policy(folder, model_config, trainable=True, quantization=base)

    # 2. The pair set.
    pairs, tokens = context.run.path("pairs"), context.run.path("pairs", "tokens")
    limits = {"max_length": args.max_length, "context": context_length(model), "cache": tokens}
    dataset = dpo_dataset(pairs / "train.parquet", tokenizer, use_soft_labels=settings.use_soft_labels, **limits)
    soft = "soft_label" in dataset.column_names
    if soft:
        prepare_soft_labels(args)
    test = None
    if count_rows(pairs / "test.parquet") > 0:
        test = dpo_dataset(
            pairs / "test.parquet", tokenizer, use_soft_labels=soft, limit=settings.test_pairs, **limits
        )

    # 3. The reference: the model itself where its log-probabilities are taken beforehand, or with adapters off.
    elsewhere = settings.reference_path
    needs_its_own = elsewhere is not None or not (args.precompute_ref_log_probs or settings.lora)
    reference = load_policy(elsewhere or folder, model_config) if needs_its_own else None

    # 4. Train.
    trainer = build_trainer(
        model,
        tokenizer,
        dataset,
        args,
        reference=reference,
        lora=settings.lora,
        test=test,
        callbacks=callbacks(context),
        reference_cache=context.run.path("pairs", "reference_logprobs"),
        reference_id=fingerprint_file(elsewhere or folder),
        starts_from_reference=elsewhere is None,
        progress=lambda done, total: context.progress(done, total, "read by the reference"),
    )
    summary = train(trainer, context)
    # Counted so far: the policy's passes, 6 N a token. The reference's forward pass takes 2 N, each epoch, or once for
    # the pairs that are trained on.
    epochs = (trainer.state.epoch or 1.0) / trainer.share_read
    context.count(flops=context.counted("flops") / 3 / (epochs if args.precompute_ref_log_probs else 1.0))

    # 5. How well its implicit reward beta log(pi/ref) orders pairs it has not seen.
    held_out = trainer.evaluate() if test is not None else {}
    save_model(trainer, context, tokenizer, settings.merge_lora)
    given = count_rows(pairs / "train.parquet")
    context.finish(
        pair_set=pair_figures.get("pair_set"),
        trained_on=trained_on(dataset, given, trainer.state.epoch),
        pairs=len(dataset),
        left_out=given - len(dataset),
        warnings=[*left_out(given, len(dataset), "dpo", args.max_length), *filter(None, [trainer.start_note])],
        soft_labels=soft,
        beta=args.beta,
        loss_type=list(args.loss_type),
        steps=trainer.state.global_step,
        train_loss=summary["train_loss"],
        test_pairs=len(test) if test is not None else 0,
        test_loss=held_out.get("eval_loss"),
        implicit_accuracy=held_out.get("eval_rewards/accuracies"),
        implicit_margin=held_out.get("eval_rewards/margins"),
        test_logprobs={side: held_out.get(f"eval_logps/{side}") for side in ("chosen", "rejected")},
    )
