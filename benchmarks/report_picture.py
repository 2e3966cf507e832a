"""A picture of a run's report, as the README shows it.

    python -m benchmarks.report_picture runs/quickstart docs/images/report.png

Takes it with headless Chromium (Debian: ``chromium``).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", default="1100,1500", help="width,height in pixels")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise UserError("no chromium found; install it to take the picture.")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    page = (arguments.run / "compare" / "report.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={arguments.size}"]
        subprocess.run([*command, f"--screenshot={arguments.output.resolve()}", page], check=True, capture_output=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
