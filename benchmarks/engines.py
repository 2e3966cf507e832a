"""Generation engines beside each other: tokens/s, seconds to hand over weights, and how far log-probabilities differ.

    python -m benchmarks.engines MODEL [--prompts 16] [--prompt-tokens 32] [--new-tokens 32] [--rounds 3] [--dtype D]

Needs vLLM (docs/performance.md says how an environment with it is made). Both engines sample from the same weights in
one process and take turns; there is no end token, so that both decode the same number of tokens. Seconds are CPU
seconds of the process. The first round of each is not counted.
"""

import argparse
import statistics
import time

import torch

from benchmarks.measure import machine
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.engine import Engine, TransformersEngine
from ppo_vs_dpo.models.sampling.generation import Generated, SamplingConfig
from ppo_vs_dpo.models.sampling.vllm.colocated import VLLMEngine


def cpu_seconds(function, *args):
    """CPU seconds of a call, and what it returned."""
    started = time.process_time()
    result = function(*args)
    return time.process_time() - started, result


@torch.no_grad()
def mismatch(model, prompts: list[list[int]], drawn: list[Generated], temperature: float) -> str:
    """Mean and largest difference of the log-probabilities, and the mean importance ratio, over the sampled tokens."""
    batch = pad_batch(prompts, [one.token_ids for one in drawn], 0)
    theirs = torch.tensor([one.logprobs for one in drawn])
    log_ratio = (response_logprobs(model, batch, temperature)[0].float() - theirs)[batch.response_mask]
    apart, ratio = log_ratio.abs(), log_ratio.exp()
    return (
        f"log-probabilities: mean |difference| {apart.mean():.2g}, largest {apart.max():.2g} nats; "
        f"importance ratio: mean {ratio.mean():.5f}, largest {ratio.max():.3f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a causal language model")
    for name, default in (("prompts", 16), ("prompt-tokens", 32), ("new-tokens", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    tokenizer, sampling = load_tokenizer(args.model), SamplingConfig(max_new_tokens=args.new_tokens)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(len(tokenizer), (args.prompts, args.prompt_tokens), generator=generator).tolist()
    dtype = getattr(torch, args.dtype)
    model = load_policy(args.model).to(dtype)
    length = args.prompt_tokens + args.new_tokens
    engines: dict[str, Engine] = {
        "transformers": TransformersEngine([], tokenizer),
        "vllm": VLLMEngine(model, sampling, [], length, dtype, 0.3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    updates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(args.rounds + 1):
        seeds = [number * args.prompts + row for row in range(args.prompts)]
        for name, engine in engines.items():
            update, _ = cpu_seconds(engine.update_weights, model)
            spent, drawn = cpu_seconds(engine.generate, prompts, sampling, seeds)
            if number:
                seconds[name].append(spent)
                updates[name].append(update)
    print(machine())
    for name in engines:
        rates = sorted(args.prompts * args.new_tokens / spent for spent in seconds[name])
        print(
            f"{args.dtype}, {name}: {statistics.median(rates):.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f}), "
            f"weights handed over in {statistics.median(updates[name]):.2f} s"
        )
    # The last draw is vLLM's.
    print(f"{args.dtype}, {mismatch(model, prompts, drawn, sampling.temperature)}")


if __name__ == "__main__":
    main()
