"""The controlled testbed: a small written world of reviews whose reward is known."""
