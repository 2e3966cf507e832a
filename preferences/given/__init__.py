"""The steps of sources whose pairs or prompts are given."""
