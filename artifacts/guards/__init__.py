"""What keeps a run whole: who works on it, what it was made from, and that files are what was written."""
