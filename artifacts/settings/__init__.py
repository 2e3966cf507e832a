"""A stage's section of the configuration: which keys it has, and what each of them does there."""

from ppo_vs_dpo.artifacts.settings.rules import refused_keys
from ppo_vs_dpo.artifacts.settings.sections import field_names, key_of, nearest, split, unknown_keys

__all__ = ["field_names", "key_of", "nearest", "refused_keys", "split", "unknown_keys"]
