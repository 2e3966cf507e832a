"""A space of prompts and responses small enough to enumerate, where the KL-regularised optimum is known exactly.

Three prompts, 40 responses each (up to three of the words a, b, c, ended by EOS or by the budget), rewards drawn once
from N(0, 1), a tiny Llama as reference. pi*(y|x) = p(y|x) exp(r(x,y)/beta) / Z(x), and J* = beta log Z (mean over
prompts).
"""

import itertools

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs

WORDS, EOS, BUDGET = ("a", "b", "c"), 3, 3


class Space:
    """Every prompt and every response, with rewards drawn from N(0, 1).

    Args:
        seed: of the rewards and of the reference's weights.
    """

    def __init__(self, seed: int, spread: float = 0.1):
        generator = np.random.default_rng(seed)
        # The end token comes first: attention over a, a, a alone could not tell how many there are.
        self.prompts = [[EOS, 0], [EOS, 1], [EOS, 2]]
        ended = [[*words, EOS] for n in range(BUDGET) for words in itertools.product(range(3), repeat=n)]
        cut = [list(words) for words in itertools.product(range(3), repeat=BUDGET)]
        self.responses = ended + cut
        self.rewards = generator.normal(size=(len(self.prompts), len(self.responses)))
        self.tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        self.reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=8,
                initializer_range=spread,
                bos_token_id=None,
                eos_token_id=EOS,
                pad_token_id=EOS,
            )
        )
        self.log_reference = self.log_probabilities(self.reference)
        # What a completion's text says about it: the words. A response that was cut has one word more than any that
        # ended.
        names = [" ".join(WORDS[t] for t in ids if t != EOS) for ids in self.responses]
        self.index = {name: number for number, name in enumerate(names)}

    def policy(self) -> LlamaForCausalLM:
        """A copy of the reference, to be trained."""
        model = LlamaForCausalLM(self.reference.config)
        model.load_state_dict(self.reference.state_dict())
        return model

    @torch.no_grad()
    def log_probabilities(self, model) -> np.ndarray:
        """Exact log pi(y | x), ``(prompts, responses)``."""
        pairs = list(itertools.product(self.prompts, self.responses))
        batch = pad_batch([p for p, _ in pairs], [r for _, r in pairs], EOS)
        logprobs, _ = response_logprobs(model.eval(), batch)
        return logprobs.double().sum(1).numpy().reshape(len(self.prompts), len(self.responses))

    def reward(self, prompts, completions, **columns) -> list[float]:
        """The reward as PPO sees it: from texts."""
        return [
            float(self.rewards[WORDS.index(prompt), self.index[" ".join(completion.split())]])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def optimum(self, beta: float) -> tuple[np.ndarray, float]:
        """log pi* and J*."""
        tilted = self.log_reference + self.rewards / beta
        log_z = np.logaddexp.reduce(tilted, axis=1, keepdims=True)
        return tilted - log_z, float(beta * log_z.mean())

    def measure(self, model, beta: float) -> dict[str, float]:
        """Exact distance of a policy from the optimum.

        Returns:
            ``gap`` = (J* - J) / (J* - J_ref), ``kl`` = KL(pi || pi*), ``kl_reverse`` = KL(pi* || pi), nats, means over
            prompts; ``kl_start`` = KL(ref || pi*).
        """
        log_pi = self.log_probabilities(model)
        if abs(np.exp(log_pi).sum(1) - 1).max() > 1e-5:
            raise ArithmeticError("the probabilities of all responses do not sum to 1: the space is not all there is")
        best, top = self.optimum(beta)

        def kl(a, b):
            return float((np.exp(a) * (a - b)).sum(1).mean())

        def objective(log_p):
            return float((np.exp(log_p) * self.rewards).sum(1).mean()) - beta * kl(log_p, self.log_reference)

        start = objective(self.log_reference)
        return {
            "gap": (top - objective(log_pi)) / (top - start),
            "kl": kl(log_pi, best),
            "kl_reverse": kl(best, log_pi),
            "kl_start": kl(self.log_reference, best),
        }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words a, b, c and an end token that is also the padding: pad == eos must not matter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def bradley_terry_pairs(space: Space, n: int, seed: int) -> Dataset:
    """Fixed pairs: prompts and two different responses drawn from a mix of reference and uniform, labels drawn once.

    The optimum does not depend on how pairs are drawn as long as every response occurs (papers: O2.2); the uniform
    part makes sure that it does.
    """
    generator = np.random.default_rng(seed + 1000)
    rows = generator.integers(len(space.prompts), size=n)
    count = len(space.responses)
    mixed = 0.5 * np.exp(space.log_reference) + 0.5 / count
    cumulative = np.cumsum(mixed / mixed.sum(1, keepdims=True), axis=1)
    first, second = (np.minimum((generator.random(n)[:, None] > cumulative[rows]).sum(1), count - 1) for _ in range(2))
    second = np.where(first == second, (second + 1 + generator.integers(count - 1, size=n)) % count, second)
    margin = space.rewards[rows, first] - space.rewards[rows, second]
    wins = generator.random(n) < 1 / (1 + np.exp(-margin))
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    return Dataset.from_dict(
        {
            "prompt_ids": [space.prompts[i] for i in rows],
            "chosen_ids": [space.responses[i] for i in chosen],
            "rejected_ids": [space.responses[i] for i in rejected],
        }
    )
