"""Sampling completions: one row's result depends on its prompt and its seed, on nothing else.

Each row draws from its own stream of uniform numbers and picks tokens by the inverse of the cumulative distribution.
So batch size, order, and the number of ranks change nothing but rounding. Finished rows leave the batch, and the
key-value cache with them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.devices import not_finite
from ppo_vs_dpo.models.passes.head import rows_logprobs
from ppo_vs_dpo.models.passes.packed import can_pack
from ppo_vs_dpo.models.passes.padding import LOW_PRECISION, TOLERANCE, check_rows, without_router
from ppo_vs_dpo.models.sampling.kv_cache import ReservedCache, close_gaps, rows_that_fit
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded
from ppo_vs_dpo.models.text.stops import by_kind, stopped

# Prompts of similar length that are read together; each run is padded to its own longest.
PROMPT_RUNS = 4
# Tokens between two looks at which rows have ended, on an accelerator: a look makes the host wait for it.
LOOK_EVERY = 8


@dataclass
class SamplingConfig:
    """How completions are drawn.

    Example::

        from ppo_vs_dpo import SamplingConfig

        plain = SamplingConfig(max_new_tokens=64)  # temperature 1, the whole distribution
        greedy = SamplingConfig(max_new_tokens=64, temperature=0.0)

    Attributes:
        max_new_tokens: the response budget, EOS included.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this mass; 1 keeps all.
        stop_strings: a response also ends where one of these appears in its text.
        batch_size: rows decoded at once, at most: on a GPU as many as its free memory takes.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    batch_size: int = 256

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; a response needs at least 1 token.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0.")
        if not all(self.stop_strings):
            raise UserError("stop_strings has an empty text, which ends every response at its first token. Remove it.")

    @property
    def changes_distribution(self) -> bool:
        """Whether top-k or top-p sample from another policy than the model, whose KL is then not the model's."""
        return self.top_k > 0 or self.top_p < 1


@dataclass
class Generated:
    """One completion: its tokens (EOS included when ``finished``) and whether it ended by itself.

    Example::

        from ppo_vs_dpo import Generated, load_tokenizer

        tokenizer = load_tokenizer("my_model")
        one = Generated(token_ids=[*tokenizer("Hello")["input_ids"], tokenizer.eos_token_id], finished=True)
        print(tokenizer.decode(one.token_ids, skip_special_tokens=True))

    Where they were asked for: the log-probability of each token and the entropy (nats) of the distribution that it
    was drawn from.
    """

    token_ids: list[int]
    finished: bool
    logprobs: list[float] | None = None
    entropy: list[float] | None = None


def row_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one row, from the run's seed and whatever names the row (prompt id, draw, update)."""
    import hashlib

    digest = hashlib.blake2b("\0".join(str(part) for part in (seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _filter(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Top-k, then top-p, on logits ``(B, V)`` already divided by the temperature."""
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def pick_tokens(logits: torch.Tensor, uniforms: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: ``(B, V)``.
        uniforms: ``(B,)`` in [0, 1).

    Returns:
        ``(B,)`` token ids; ``argmax`` where the temperature is 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = _filter(logits.float() / sampling.temperature, sampling)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    targets = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return picked.clamp_max(logits.shape[-1] - 1)


def _uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """``(B, length)`` numbers in [0, 1), row i from the Philox stream of ``seeds[i]``."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


@part("sampling")
def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    eos_token_ids: Sequence[int],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
    with_logprobs: bool = False,
) -> list[Generated]:
    """Draw one completion for every prompt.

    Example::

        from ppo_vs_dpo import SamplingConfig, generate, load_policy, load_tokenizer

        model, tokenizer = load_policy("my_model"), load_tokenizer("my_model")
        prompts = [tokenizer(text)["input_ids"] for text in ("the film", "a story")]
        sampling = SamplingConfig(max_new_tokens=16)
        ends = [tokenizer.eos_token_id]
        for one in generate(model, prompts, sampling, eos_token_ids=ends, seeds=[1, 2]):
            print(tokenizer.decode(one.token_ids), one.finished)

    Args:
        prompt_ids: ``N`` prompts as token ids, none empty.
        seeds: ``N`` seeds, one a row; see `row_seed`.
        tokenizer: needed for ``stop_strings`` only.
        progress: called with (rows done, N).
        with_logprobs: also log-probabilities and entropies, of the model at this temperature (without top-k and
            top-p); equal to those of a pass over the whole sequence up to rounding.

    Returns:
        ``N`` completions in the order of the prompts.

    Raises:
        UserError: an empty prompt (names its number), stop strings without a tokenizer, log-probabilities at
            temperature 0, a model that reads padding or whose logits are not finite, rows beyond where its
            positions change.
    """
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"prompt {number} has no tokens.")
    if sampling.stop_strings and tokenizer is None:
        raise UserError("stop_strings need the tokenizer.")
    if with_logprobs and sampling.temperature == 0:
        raise UserError("greedy decoding has no log-probabilities to sample with.")
    # Similar lengths together: less padding. Results are put back in order.
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    results: list[Generated | None] = [None] * len(prompt_ids)
    was_training = model.training
    model.eval()
    try:
        columns = max(map(len, prompt_ids), default=0) + sampling.max_new_tokens
        check_rows(model, columns)
        check_decodes(model)
        size = rows_that_fit(model, columns, sampling.batch_size)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = _generate_batch(
                model,
                [prompt_ids[r] for r in rows],
                [seeds[r] for r in rows],
                sampling,
                set(eos_token_ids),
                tokenizer,
                with_logprobs,
            )
            for row, generated in zip(rows, batch, strict=True):
                results[row] = generated
            if progress is not None:
                progress(min(start + size, len(order)), len(order))
    finally:
        model.train(was_training)
    return results


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: SamplingConfig,
    eos: set[int],
    tokenizer: PreTrainedTokenizerBase | None,
    with_logprobs: bool,
) -> list[Generated]:
    device = next(model.parameters()).device
    widths, most = [len(ids) for ids in prompts], sampling.max_new_tokens
    longest, padded = max(widths), min(widths) < max(widths)
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - width) + [1] * width for width in widths], device=device)
    uniforms = _uniforms(seeds, most).to(device)
    eos_tensor = torch.tensor(sorted(eos), device=device)
    tokens = torch.zeros(len(prompts), most, dtype=torch.long, device=device)
    # Log-probabilities and entropies.
    figures = torch.zeros(2, *tokens.shape, device=device) if with_logprobs else None
    lengths = torch.full((len(prompts),), most, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    # The rows that are still decoded: their numbers, whether they have ended since the last look, and where.
    alive, over, length = torch.arange(len(prompts), device=device), finished.clone(), lengths.clone()
    peaks = torch.zeros((), device=device)
    every = _look_every(device, sampling)
    stops = by_kind(sampling.stop_strings, tokenizer) if sampling.stop_strings else {}
    # The last token is not read.
    cache = ReservedCache(model.config, capacity=longest + most - 1)
    logits = _read_prompts(model, input_ids, attention_mask, widths, cache)
    position_ids = attention_mask.sum(-1, keepdim=True)
    # Room for the masks of all steps: a step looks at the columns so far.
    attention_mask = torch.nn.functional.pad(attention_mask, (0, most), value=1)

    for step in range(most):
        # NaN has no place in a distribution: the inverse of it is the last token, for ever. A sum hands it on.
        peaks += logits.amax()
        picked = pick_tokens(logits, uniforms[alive, step], sampling)
        tokens[alive, step] = picked
        if figures is not None:
            figures[:, alive, step] = torch.stack(rows_logprobs(logits, picked, sampling.temperature))
        ended = torch.isin(picked, eos_tensor)
        if sampling.stop_strings:
            ended |= torch.tensor(stopped(tokens[alive, : step + 1], tokenizer, stops), device=device)
        # What a row samples after its end is cut off below.
        length = torch.where(ended & ~over, step + 1, length)
        over = over | ended
        last = step + 1 == most
        if last or (step + 1) % every == 0:
            finished[alive], lengths[alive] = over, length
            gone = [] if last else over.tolist()
            if any(gone):
                rows = close_gaps(gone)
                if not rows:
                    break
                keep = cache.keep(rows, device)
                alive, picked, over, length = alive[keep], picked[keep], over[keep], length[keep]
                attention_mask, position_ids = attention_mask[keep], position_ids[keep]
        if not last:
            mask = _step_mask(model, cache, attention_mask[:, : longest + step + 1], padded)
            logits = _read(model, picked[:, None], mask, position_ids + step, cache)
    ends = torch.stack([lengths, finished.long(), peaks.isfinite().long().expand_as(lengths)])
    lengths, finished, finite = ends.tolist()
    if not all(finite):
        raise not_finite(model, "gives next tokens scores")
    completions = [
        Generated(row[:length], bool(end)) for row, length, end in zip(tokens.tolist(), lengths, finished, strict=True)
    ]
    if figures is not None:
        for one, logprobs, entropy in zip(completions, *figures.tolist(), strict=True):
            one.logprobs, one.entropy = logprobs[: len(one.token_ids)], entropy[: len(one.token_ids)]
    return completions


def _look_every(device: torch.device, sampling: SamplingConfig) -> int:
    """Tokens between two looks: a text is looked at on the host anyway, and a CPU does not wait for itself."""
    return 1 if sampling.stop_strings or device.type == "cpu" else LOOK_EVERY


def _read_prompts(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    widths: list[int],
    cache: ReservedCache,
) -> torch.Tensor:
    """Fill the cache with left-padded prompts ``(B, P)``, shortest first; logits ``(B, V)`` of the first token."""
    count = len(widths)
    runs = PROMPT_RUNS if cache.reserves and widths[0] != widths[-1] else 1
    size = -(-count // runs)
    logits = []
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        width = max(widths[rows])
        mask = attention_mask[rows, -width:]
        with cache.reading(rows, count, input_ids.shape[1]) as part:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            logits.append(_read(model, input_ids[rows, -width:], mask, positions, part))
    return torch.cat(logits)


def _read(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Read tokens ``(B, n)`` into the cache; logits ``(B, V)`` of the one after the last."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "past_key_values"
    if "cache_params" in inspect.signature(type(owner).forward).parameters:
        # Mamba's: a state alone, into which a single token goes without a mask.
        name, attention_mask = "cache_params", None if input_ids.shape[1] == 1 else attention_mask
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
        **without_router(model),
    ).logits[:, -1]


@torch.no_grad()
def check_decodes(model: PreTrainedModel) -> None:
    """A token read into the cache must give what the whole row gives at once; looked at once a model.

    Raises:
        UserError: it does not: the model keeps a state that this loop does not hand on.
    """
    known = isinstance(model, PreTrainedModel) and can_pack(model)
    if known or getattr(model, "_decodes", False) or is_sharded(next(model.parameters())):
        return
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    top = int(model.config.get_text_config().vocab_size) - 1
    ids = torch.tensor([[top // 2, top // 3, top // 4, top // 5]], device=device)
    ones, positions = torch.ones_like(ids), torch.arange(4, device=device)[None]
    try:
        cache = ReservedCache(model.config, capacity=4)
        cut = _read_prompts(model, ids[:, :2], ones[:, :2], [2], cache)
        for place in (2, 3):
            mask = _step_mask(model, cache, ones[:, : place + 1], False)
            cut = _read(model, ids[:, place : place + 1], mask, positions[:, place : place + 1], cache)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be sampled from token by token here: it has "
            f"no cache of keys and values, or one of its own ({error}). Use another architecture, or another engine."
        ) from error
    whole = model(input_ids=ids, attention_mask=ones, position_ids=positions, use_cache=False, **without_router(model))
    right = whole.logits[:, -1].float()
    if not (cut.float() - right).abs().max() <= TOLERANCE.get(dtype, LOW_PRECISION) * right.abs().max():
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be sampled from token by token here: with its "
            f"cache it gives other probabilities than in one pass. Use another architecture, or another engine."
        )
    model._decodes = True


def _step_mask(
    model: PreTrainedModel, cache: ReservedCache, attention_mask: torch.Tensor, padded: bool
) -> torch.Tensor | None:
    """What one new token a row may look at: nothing to say without padding, else ``(B, 1, 1, L)`` where it is known
    that the model takes a finished mask, or ``(B, L)`` for it to build its own."""
    if cache.reserves and can_pack(model):
        return attention_mask[:, None, None].bool() if padded else None
    return attention_mask
