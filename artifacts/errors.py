"""What a person reads: errors, and text on a terminal."""

import errno
import sys
from typing import Any


class UserError(Exception):
    """What is wrong, where (file, line, key, sample) and what to do. Shown without a traceback; exit code 2.

    Example::

        from ppo_vs_dpo import RunFolder, UserError

        try:
            RunFolder("nowhere")
        except UserError as error:
            print(error)  # nowhere is not a run folder: ...
    """


class Complaint(UserError):
    """Every problem of a configuration.

    Attributes:
        problems: a sentence each.
        config: as far as it could be composed, for whoever looks at the rest of it; ``None`` where it could not.
    """

    def __init__(self, problems: list[str], config: Any = None):
        self.problems, self.config = list(dict.fromkeys(problems)), config
        super().__init__("\n  ".join(["the configuration has errors:", *self.problems]))


def first_sentence(error: Any) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# What the operating system says when it is the disk, the process or the rights that are at fault, and not a file.
NOT_THE_FILE = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
    | {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINTR}
)


def not_the_file(error: BaseException) -> bool:
    """Whether reading failed for a reason that says nothing of what was read: it may well be whole.

    True of a disk that does not answer, of missing rights, and of memory that is full, the GPU's as well.
    """
    if isinstance(error, OSError):
        return error.errno in NOT_THE_FILE
    return out_of_memory(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory is full: Python's, torch's or the GPU's."""
    names = {one.__name__ for one in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def explain_os_error(error: OSError) -> str | None:
    """One sentence for an operating-system error that a user can act on, or ``None`` for all others."""
    # A rename has two names: what was written bears a temporary one.
    where = error.filename2 or error.filename
    place = f" ({where})" if where else ""
    number = error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place}. Free some space and start the same command again: finished work is kept."
    if number == errno.EROFS:
        return f"the file system is read-only{place}. Choose a folder that can be written: output_dir=..."
    if number in (errno.EACCES, errno.EPERM) and error.filename:
        return f"no permission to read or write{place}. Choose a folder that can be written: output_dir=..."
    if number == errno.ENAMETOOLONG:
        return f"a name is longer than this file system takes{place}. Choose shorter ones: name=..., output_dir=..."
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST) and error.filename:
        what = {errno.EISDIR: "a folder", errno.ENOTDIR: "a file"}.get(number, "something else")
        return f"{what} stands where this run needs something else{place}. Move it away, or choose name=..."
    if number == errno.ENOENT and error.filename:
        return f"a file or folder is gone{place}. If somebody removed it, the same command makes it again."
    if number in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO):
        return (
            f"the disk does not answer{place}: {error.strerror}. Finished work is kept; start the same command again."
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many files are open. Raise the limit (ulimit -n) and start the same command again."
    return None


def in_help(docstring: str | None) -> str:
    """A docstring as ``--help`` shows it: without the marks that are for documentation."""
    return (docstring or "").replace("``", "")


def printable(text: str) -> str:
    """``text`` for a terminal: control characters other than line ends and tabs as their escapes.

    Completions, prompts and names are data; an escape sequence in them must not act on a reader's terminal.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(value: Any, limit: int = 120) -> str:
    """A value as Python writes it, cut where that is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def say(text: str) -> None:
    """Write text to standard output as a terminal may show it; all that the package says goes through here."""
    sys.stdout.write(printable(text))


def warn(text: str) -> None:
    """Write text to standard error as a terminal may show it."""
    sys.stderr.write(printable(text))


def terminal(**settings: Any) -> Any:
    """A ``rich.console.Console`` that draws texts, titles and cells of tables as a terminal may show them.

    What is in square brackets is rich's markup, in cells as well: data goes through ``rich.markup.escape``, or in as
    ``rich.text.Text(printable(...))``.
    """
    from rich.console import Console

    class Terminal(Console):
        def render_str(self, text: str, *args: Any, **more: Any) -> Any:
            return super().render_str(printable(text), *args, **more)

    return Terminal(**settings)
