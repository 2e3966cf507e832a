"""The least that one PPO update can cost: floating-point operations of every needed pass over real tokens.

Counted from the sizes of a Llama and the lengths that were sampled; matrix products only (what else there is, norms,
softmax, the optimizer, has no floor of its own here). A product of ``(m, k)`` and ``(k, n)`` is 2 m k n.
"""

from dataclasses import dataclass


@dataclass
class Shape:
    """Sizes of a Llama with as many key-value heads as heads."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Weights that every token is multiplied with: four of attention, three of the MLP, in each layer."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the language-model head."""
        return self.hidden * self.vocabulary


def forward(shape: Shape, tokens: list[int], states: list[int], heads: int) -> float:
    """FLOPs of one causal pass over sequences.

    The last layer needs keys and values of every token, and all else only where its states are asked for.

    Args:
        shape: of the model.
        tokens: of each sequence.
        states: last hidden states that are needed, at the end of each sequence.
        heads: positions for the language-model head.
    """
    asked = 2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    body = 2 * ((shape.layer_weights - asked) * sum(tokens) + asked * sum(states))
    # Queries by keys and weights by values: 2 x 2 d a pair of positions, and half of the pairs are causal.
    pairs = (shape.layers - 1) * sum(n * (n + 1) / 2 for n in tokens)
    pairs += sum(s * n - s * (s - 1) / 2 for n, s in zip(tokens, states, strict=True))
    return body + 4 * shape.hidden * pairs + 2 * shape.head_weights * heads


def update(shape: Shape, prompts: list[int], responses: list[int], epochs: int) -> dict[str, float]:
    """FLOPs of one PPO update by phase, and the bytes that decoding must read.

    Generation: the tokens themselves, once (its log-probabilities come with it). Scoring: reference, reward and value
    model. Training: forward and backward (twice a forward) of policy and value model in each epoch.

    Args:
        shape: of all four models.
        prompts: tokens of each prompt.
        responses: tokens of each response.
        epochs: passes over the rollout.
    """
    # The last token of a response is never fed back; the state after it is nobody's but the reward model's.
    fed = [p + r - 1 for p, r in zip(prompts, responses, strict=True)]
    ones, drawn = [1] * len(fed), sum(responses)
    policy, value = forward(shape, fed, responses, drawn), forward(shape, fed, responses, 0)
    reward = forward(shape, [length + 1 for length in fed], ones, 0)
    kept = sum(2 * shape.hidden * (p * r + r * (r + 1) // 2) for p, r in zip(prompts, responses, strict=True))
    return {
        "generate": policy,
        "score": policy + value + reward,
        "train": epochs * 3 * (policy + value),
        # Weights once a step, keys and values of every live row at every step; 4 bytes each.
        "bytes": 4.0 * ((shape.layer_weights + shape.head_weights) * max(responses) + shape.layers * kept),
    }
