"""Step 7 of an update: from a rollout to new weights."""
