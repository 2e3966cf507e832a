"""The command that fills the table of docs/gpu.md runs, here at a size for a CPU."""

import sys

from benchmarks import gpu


def test_a_row_of_the_table(capsys, monkeypatch):
    arguments = ["--size", "tiny", "--prompt", "16", "--response", "12", "--updates", "2", "--rows", "8"]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    head, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["model"] == "tiny full"
    phases = [float(cells[f"{phase}, s"]) for phase in gpu.PHASES]
    assert abs(sum(phases) - float(cells["s an update"])) < 0.03
    # No response ends early: 8 of 12 tokens each.
    rate = float(cells["tokens/s"].replace(",", ""))
    assert abs(rate * float(cells["s an update"]) / 96 - 1) < 0.3
