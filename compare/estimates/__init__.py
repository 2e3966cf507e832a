"""From judgements to estimates with their errors."""
