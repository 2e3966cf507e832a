"""From prompts and completions, as text or conversations, to token ids."""
