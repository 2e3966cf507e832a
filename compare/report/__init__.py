"""From figures to a report that a person reads."""
