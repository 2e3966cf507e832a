"""Sampling completions: one row's result depends on its prompt and its seed, on nothing else.

Each row draws from its own stream of uniform numbers and picks tokens by the inverse of the cumulative distribution.
So batch size, order, and the number of ranks change nothing but rounding. Finished rows leave the batch, and the
key-value cache with them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.devices import not_finite
from ppo_vs_dpo.models.passes.head import rows_logprobs
from ppo_vs_dpo.models.passes.packed import can_pack
from ppo_vs_dpo.models.passes.padding import LOW_PRECISION, TOLERANCE, check_rows, known_decoder, without_router
from ppo_vs_dpo.models.sampling.fixed import FixedDecoding, graphs_for
from ppo_vs_dpo.models.sampling.forked import in_processes, may_fork
from ppo_vs_dpo.models.sampling.kv_cache import ReservedCache, close_gaps, read, rows_that_fit
from ppo_vs_dpo.models.sampling.picking import LOOK_EVERY, Drawn, SamplingConfig, pick_tokens, uniform_rows
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded
from ppo_vs_dpo.models.text.stops import by_kind, stopped

# Prompts of similar length that are read together; each run is padded to its own longest.
PROMPT_RUNS = 4


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
    workers: int = 1,
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
        workers: processes that share the batches, where there are several and a fork is safe (`forked.may_fork`);
            changes nothing of what is drawn.

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
        starts = range(0, len(order), size)

        def drawn(start: int) -> list[Generated]:
            rows = order[start : start + size]
            return _generate_batch(
                model,
                [prompt_ids[r] for r in rows],
                [seeds[r] for r in rows],
                sampling,
                set(eos_token_ids),
                tokenizer,
                with_logprobs,
            )

        shared = len(starts) > 1 and may_fork(workers)
        batches = in_processes(drawn, starts, workers) if shared else ((start, drawn(start)) for start in starts)
        done = 0
        for start, batch in batches:
            for row, generated in zip(order[start : start + size], batch, strict=True):
                results[row] = generated
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
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
    uniforms = uniform_rows(seeds, most).to(device)
    eos_tensor = torch.tensor(sorted(eos), device=device)
    drawn = Drawn.empty(len(prompts), most, with_logprobs, device)
    stops = by_kind(sampling.stop_strings, tokenizer) if sampling.stop_strings else {}
    stop = functools.partial(stopped, tokenizer=tokenizer, kinds=stops) if stops else None
    # The last token is not read.
    cache = ReservedCache(model.config, capacity=longest + most - 1)
    logits = _read_prompts(model, input_ids, attention_mask, widths, cache)
    graph = graphs_for(model, sampling, device)
    if graph is None:
        _decode(model, cache, logits, attention_mask, uniforms, eos_tensor, sampling, drawn, padded, stop)
    else:
        given = (model, cache, logits, attention_mask, uniforms, eos_tensor, sampling, drawn)
        FixedDecoding(*given, graph).run(stop)
    ends = torch.stack([drawn.lengths, drawn.finished.long(), drawn.peaks.isfinite().long().expand(len(prompts))])
    lengths, finished, finite = ends.tolist()
    if not all(finite):
        raise not_finite(model, "gives next tokens scores")
    completions = [
        Generated(row[:length], bool(end))
        for row, length, end in zip(drawn.tokens.tolist(), lengths, finished, strict=True)
    ]
    if with_logprobs:
        for one, logprobs, entropy in zip(completions, *drawn.figures.tolist(), strict=True):
            one.logprobs, one.entropy = logprobs[: len(one.token_ids)], entropy[: len(one.token_ids)]
    return completions


def _decode(
    model: PreTrainedModel,
    cache: ReservedCache,
    logits: torch.Tensor,
    attention_mask: torch.Tensor,
    uniforms: torch.Tensor,
    eos: torch.Tensor,
    sampling: SamplingConfig,
    drawn: Drawn,
    padded: bool,
    stop: Callable[[torch.Tensor], list[bool]] | None,
) -> None:
    """The tokens after some prompts: arguments as of `FixedDecoding` and its ``run``; ``padded`` where prompts differ
    in length. Attention sees the columns so far, and rows leave as soon as they are seen to have ended."""
    device, (_, longest), most = logits.device, attention_mask.shape, sampling.max_new_tokens
    # The rows that are still decoded: their numbers, whether they have ended since the last look, and where.
    alive, over, length = torch.arange(len(logits), device=device), drawn.finished.clone(), drawn.lengths.clone()
    every = _look_every(device, sampling)
    position_ids = attention_mask.sum(-1, keepdim=True)
    # Room for the masks of all steps: a step looks at the columns so far.
    attention_mask = torch.nn.functional.pad(attention_mask, (0, most), value=1)

    for step in range(most):
        # NaN has no place in a distribution: the inverse of it is the last token, for ever. A sum hands it on.
        drawn.peaks += logits.amax()
        picked = pick_tokens(logits, uniforms[alive, step], sampling)
        drawn.tokens[alive, step] = picked
        if drawn.figures is not None:
            drawn.figures[:, alive, step] = torch.stack(rows_logprobs(logits, picked, sampling.temperature))
        ended = torch.isin(picked, eos)
        if stop is not None:
            ended |= torch.tensor(stop(drawn.tokens[alive, : step + 1]), device=device)
        # What a row samples after its end is cut off below.
        length = torch.where(ended & ~over, step + 1, length)
        over = over | ended
        last = step + 1 == most
        if last or (step + 1) % every == 0:
            drawn.finished[alive], drawn.lengths[alive] = over, length
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
            logits = read(model, picked[:, None], mask, position_ids + step, cache)


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
            logits.append(read(model, input_ids[rows, -width:], mask, positions, part))
    return torch.cat(logits)


@torch.no_grad()
def check_decodes(model: PreTrainedModel) -> None:
    """A token read into the cache must give what the whole row gives at once; looked at once a model.

    Raises:
        UserError: it does not: the model keeps a state that this loop does not hand on.
    """
    if known_decoder(model) or getattr(model, "_decodes", False) or is_sharded(next(model.parameters())):
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
            cut = read(model, ids[:, place : place + 1], mask, positions[:, place : place + 1], cache)
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
