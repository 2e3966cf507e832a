"""The comparison's statistics under simulation."""
