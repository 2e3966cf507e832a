"""Where the command begins (``python -m ppo_vs_dpo``): Ctrl-C is heard from here on, also while libraries load."""

import sys


class Interrupt:
    """A handler of Ctrl-C that remembers it: a library that catches everything makes another error of it.

    OmegaConf does, and says that "'NoneType' object has no attribute ...".
    """

    heard = False

    def __call__(self, number: int, frame: object) -> None:
        self.heard = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point; exit codes are those of `pipeline.cli.main`."""
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # one that is ignored stays so
            signal.signal(signal.SIGINT, Interrupt())
        from ppo_vs_dpo.pipeline.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on, a stage from its last checkpoint.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
