"""Stage 1: the reward model (TRL's ``RewardTrainer``) on ``pairs/train.parquet``, from the SFT policy's weights.

Reads ``sft/model``, ``pairs/`` and ``data/prompts_train.parquet``; writes ``reward_model/model`` (with the bias that
centres scores on SFT samples) and ``reward_model/report.json``.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl.trainer.reward_config import RewardConfig

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.files import atomic_folder, read_json, read_parquet, write_json
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
from ppo_vs_dpo.models.loading.files import BIAS_KEY, FOREIGN_KEY, HEAD_KEY
from ppo_vs_dpo.models.loading.prepared import score_head, train_in_full
from ppo_vs_dpo.models.loading.pretrained import context_length, load_sampler, load_tokenizer, load_value_or_reward
from ppo_vs_dpo.models.loading.quantized import quantization
from ppo_vs_dpo.models.loading.vocabulary import check_tokens
from ppo_vs_dpo.models.passes.logprobs import backbone, base
from ppo_vs_dpo.models.passes.padding import check_causal
from ppo_vs_dpo.models.passes.unpadded import score_at_last_token
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, row_seed
from ppo_vs_dpo.models.sharding.deepspeed import deepspeed_settings, is_sharded, unsharded_loading, whole
from ppo_vs_dpo.models.text.encoding import count_rows, encode_prompts, left_out
from ppo_vs_dpo.models.text.prompts import decode_completion
from ppo_vs_dpo.models.text.trained_on import trained_on
from ppo_vs_dpo.models.training import callbacks, model_settings, save_model, train, training_arguments
from ppo_vs_dpo.preferences.reading.parquet import read_rows
from ppo_vs_dpo.reward_model.config import RewardModelStage
from ppo_vs_dpo.reward_model.data import reward_dataset, without_margin
from ppo_vs_dpo.reward_model.ensemble import MEMBERS, average, member_context, members_of
from ppo_vs_dpo.reward_model.report import write_report
from ppo_vs_dpo.reward_model.scorer import RewardScorer, store_bias, store_length_slope
from ppo_vs_dpo.reward_model.trainer import PairRewardTrainer

PAIR_COLUMNS = ["prompt", "chosen", "rejected"]


def initial_model(path, config, head_init: str, seed: int, base=None) -> PreTrainedModel:
    """The SFT policy's backbone under a new scalar head.

    With ``zero`` every score is 0 before the first step and the loss is log 2 exactly. ``base``: how the backbone is
    quantised (`models.loading.quantized`).
    """
    set_seed(seed)
    model = load_value_or_reward(path, config, trainable=True, quantization=base)
    head = score_head(model)
    with whole([head.weight]):
        if head_init == "zero":
            torch.nn.init.zeros_(head.weight)
        elif is_sharded(head.weight):
            torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return model


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: RewardConfig,
    lora: LoraSettings | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> PairRewardTrainer:
    """TRL's trainer on a data set from `reward_model.data.reward_dataset`.

    The score is read at the last real token by the mask, also where padding is the end-of-sequence token.

    Raises:
        UserError: the model reads to both sides, or has fewer tokens than the tokenizer.
    """
    check_tokens(model, tokenizer, "the model")
    check_causal(backbone(model))
    trainer = PairRewardTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora.peft_config("SEQ_CLS") if lora else None,
        callbacks=callbacks,
    )
    score_at_last_token(trainer.model, pairs=True)
    # What it becomes is read where it is trained: the mark of our own (`reward_model.scorer.is_foreign`).
    setattr(base(trainer.model).config, BIAS_KEY, 0.0)
    train_in_full(trainer.model, trainer.is_deepspeed_enabled)
    return trainer


def sft_samples(context: StageContext, settings: RewardModelStage) -> dict[str, list]:
    """Samples of the SFT policy on training prompts: ``prompts``, ``completions``, ``finished``.

    They are drawn by the run's seed and the prompt's number, so a resumed stage draws the same.
    """
    model, tokenizer, ends = load_sampler(context.run.path("sft", "model"), model_settings(context))
    prompts = read_parquet(context.run.path("data", "prompts_train.parquet"), ["prompt"])["prompt"][: settings.samples]
    limit = context_length(model)
    room = None if limit is None else limit - settings.sample_max_new_tokens
    ids = encode_prompts(tokenizer, prompts)
    kept = [row for row, prompt in enumerate(ids) if room is None or len(prompt) <= room]
    sampling = SamplingConfig(max_new_tokens=settings.sample_max_new_tokens, batch_size=settings.scoring_batch_size)
    drawn = generate(
        model,
        [ids[row] for row in kept],
        sampling,
        eos_token_ids=ends,
        seeds=[row_seed(context.seed, "reward_model", row) for row in kept],
        progress=lambda done, total: context.progress(done, total, "sampling"),
    )
    return {
        "prompts": [prompts[row] for row in kept],
        "completions": [decode_completion(tokenizer, sample.token_ids) for sample in drawn],
        "finished": [sample.finished for sample in drawn],
        "tokens": [len(sample.token_ids) for sample in drawn],
    }


def centre_and_report(
    context: StageContext,
    settings: RewardModelStage,
    saved: Path,
    pairs: Dataset,
    test: Dataset,
    max_length: int | None,
    labels_from_gold: bool,
) -> dict:
    """What follows training, on one rank: the bias, put into the saved model, and the report.

    Returns:
        The report's figures and ``score_bias``.
    """
    # 1. Centre its scores on what the SFT policy writes (Huang et al. 2024, detail 15).
    samples = sft_samples(context, settings)
    scorer = RewardScorer.load(saved, model_settings(context), settings.scoring_batch_size)
    raw = scorer.score(samples["prompts"], samples["completions"], samples["finished"])
    scorer.bias = sum(raw) / len(raw)
    slope = length_slope(raw, samples["tokens"])
    for folder in (saved, *([context.dir / "adapter"] if settings.lora and settings.merge_lora else [])):
        store_bias(folder, scorer.bias)
        store_length_slope(folder, slope)
    others = [centre(member, model_settings(context), settings, samples) for member in members_of(context.dir)[1:]]

    # 2. Say how good it is, before PPO trusts it.
    report = write_report(
        context.dir,
        scorer,
        train=pairs,
        test=test,
        samples={**samples, "scores": [score - scorer.bias for score in raw]},
        labels_from_gold=labels_from_gold,
        label_noise=settings.label_noise,
        limit=settings.test_pairs,
        max_length=max_length,
        more={"length_slope": slope, **disagreement([raw, *others])},
    )
    return {**report, "score_bias": scorer.bias}


def centre(saved: Path, config: ModelConfig, settings: RewardModelStage, samples: dict[str, list]) -> list[float]:
    """Centre one more member of an ensemble on the same samples; gives their raw scores."""
    store_bias(saved, 0.0)
    scorer = RewardScorer.load(saved, config, settings.scoring_batch_size)
    raw = scorer.score(samples["prompts"], samples["completions"], samples["finished"])
    store_bias(saved, sum(raw) / len(raw))
    store_length_slope(saved, length_slope(raw, samples["tokens"]))
    return raw


def length_slope(scores: list[float], tokens: list[int]) -> float:
    """What one token more is worth: the slope of scores on lengths by least squares; 0 where lengths do not differ."""
    lengths, values = np.asarray(tokens, dtype=float), np.asarray(scores, dtype=float)
    spread = ((lengths - lengths.mean()) ** 2).sum()
    return float(((lengths - lengths.mean()) * values).sum() / spread) if spread > 0 else 0.0


def disagreement(raw: list[list[float]]) -> dict[str, float]:
    """Of an ensemble: how many, and the mean over samples of the spread of their centred scores."""
    if len(raw) < 2:
        return {}
    scores = np.asarray(raw)
    return {"ensemble": len(raw), "ensemble_spread": float((scores - scores.mean(1, keepdims=True)).std(0).mean())}


def take_given(
    context: StageContext, settings: RewardModelStage, source: str, test: Dataset, labels_from_gold: bool
) -> None:
    """A reward model that was trained elsewhere in the place of one of this run: linked, centred, judged.

    Its weights are not copied: ``model/`` links to them, and has a configuration of its own for the bias.

    Raises:
        UserError: it is not there, or gives no single score.
    """
    if not context.is_main_process:
        return
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise UserError(
                f"reward_model.path={source}: {first_sentence(error)} Give a folder, or a name on the Hub."
            ) from error
    with atomic_folder(context.dir / "model") as target:
        for file in sorted(folder.iterdir()):
            if file.name == "config.json":
                (target / file.name).write_bytes(file.read_bytes())
            elif file.is_file() and file.name != "README.md":
                (target / file.name).symlink_to(file.resolve())
        # Its own bias does not make it one of ours, trained to be read at the last token.
        config = target / "config.json"
        content = read_json(config) if config.is_file() else {}
        write_json(config, {**content, FOREIGN_KEY: True} | ({HEAD_KEY: settings.head} if settings.head else {}))
    seen = read_parquet(context.run.path("pairs", "train.parquet"), PAIR_COLUMNS)
    seen = seen.select(range(min(len(test), len(seen))))
    with unsharded_loading():
        report = centre_and_report(context, settings, context.dir / "model", seen, test, None, labels_from_gold)
    context.finish(
        given=source,
        **{key: report[key] for key in ("score_bias", "accuracy", "ceiling", "ece", "brier", "warnings")},
    )


def fit(
    context: StageContext, settings: RewardModelStage, args: RewardConfig, head_seed: int
) -> tuple[PairRewardTrainer, Dataset, dict]:
    """Train one model and save it; a member of an ensemble has a context of its own.

    Returns:
        The trainer, the pairs it trained on, TRL's summary.
    """
    # 1. Where it starts: the SFT policy's weights, a head that knows nothing.
    folder, model_config = context.run.path("sft", "model"), model_settings(context)
    tokenizer = load_tokenizer(folder)
    base = quantization(settings.lora, model_config, context)
    model = initial_model(folder, model_config, settings.head_init, head_seed, base)

    # 2. Train on the pair set.
    dataset = reward_dataset(
        context.run.path("pairs", "train.parquet"),
        tokenizer,
        args.max_length,
        context_length(model),
        settings.use_margin,
        settings.use_soft_labels,
        cache=context.run.path("pairs", "tokens"),
    )
    trainer = build_trainer(model, tokenizer, dataset, args, settings.lora, callbacks(context))
    summary = train(trainer, context)
    save_model(trainer, context, tokenizer, settings.merge_lora)
    return trainer, dataset, summary


def run_stage(context: StageContext) -> None:
    """Run the stage."""
    settings, passed = split(context.config, RewardModelStage, RewardConfig, where="reward_model")
    context.run.require("sft")
    pair_figures = context.run.require("pairs")["figures"]
    args = training_arguments(RewardConfig, context, passed)
    model_config = model_settings(context)

    test = read_parquet(context.run.path("pairs", "test.parquet"), PAIR_COLUMNS)
    if len(test) == 0:
        raise UserError(
            "pairs/test.parquet has no rows, and the reward model must be judged on pairs it has not seen. Hold some "
            "out (the data section's test split)."
        )

    if settings.path is not None:
        take_given(context, settings, settings.path, test, "label_ceiling" in pair_figures)
        return

    if settings.ensemble > 1 and deepspeed_settings(context) is not None:
        raise UserError(
            "reward_model.ensemble trains one model after the other in a process, and DeepSpeed's engine is made once "
            "a process: set deepspeed=none (a reward model of the size that fits), or ensemble=1."
        )

    # 1. and 2. The SFT policy's weights under a head that knows nothing, trained on the pair set; and so each member.
    path = context.run.path("pairs", "train.parquet")
    trainer, dataset, summary = fit(context, settings, args, context.seed)
    saved, margins = context.dir / "model", without_margin(dataset)
    for number in range(1, settings.ensemble):
        member = member_context(context, number)
        if not (member.dir / "model").is_dir():
            head = context.seed if settings.average_weights else member.seed
            fit(member, settings, training_arguments(RewardConfig, member, passed), head)
    if not context.is_main_process:
        return
    # An adapter alone has no config.json to carry the mark: it is read where it was trained, before the bias is known.
    store_bias(saved, 0.0)
    if settings.average_weights:
        first = member_context(context, 0).dir / "model"
        with atomic_folder(first) as target:
            shutil.copytree(saved, target, dirs_exist_ok=True)
        average([first, *(context.dir.glob(f"{MEMBERS}/[1-9]*/model"))], saved, model_config)

    # 3. Centre its scores, and say how good it is.
    from_gold = "label_ceiling" in pair_figures
    with unsharded_loading():
        # As many training pairs as test pairs are scored, to see over-fitting.
        seen = Dataset.from_list(list(itertools.islice(read_rows(path), len(test))))
        report = centre_and_report(context, settings, saved, seen, test, args.max_length, from_gold)
    given = count_rows(path)
    warnings = [*left_out(given, len(dataset), "reward_model", args.max_length), *margins, *report["warnings"]]
    context.finish(
        pair_set=pair_figures.get("pair_set"),
        trained_on=trained_on(dataset, given, trainer.state.epoch),
        pairs=len(dataset),
        left_out=given - len(dataset),
        soft_labels="soft_label" in dataset.column_names,
        steps=trainer.state.global_step,
        train_loss=summary["train_loss"],
        **{key: report[key] for key in ("score_bias", "accuracy", "ceiling", "ece", "brier")},
        warnings=warnings,
    )
