"""Errors that are meant to be read by a person."""

import errno


class UserError(Exception):
    """What is wrong, where (file, line, key, sample) and what to do. Shown without a traceback; exit code 2."""


def explain_os_error(error: OSError) -> str | None:
    """One sentence for an operating-system error that a user can act on, or ``None`` for all others."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place}. Free some space and start the same command again: finished work is kept."
    if error.errno == errno.EROFS:
        return f"the file system is read-only{place}. Choose a folder that can be written: output_dir=..."
    if error.errno == errno.EACCES:
        return f"no permission to write{place}. Choose a folder that can be written: output_dir=..."
    return None
