"""Files of pairs for the tests, and a run that reads them."""

import json

from ppo_vs_dpo.artifacts.files import read_json
from tests.preferences.conftest import make_run, run_here

ROWS = [{"prompt": f"Question {i}?", "chosen": f" Answer {i}.", "rejected": f" Nonsense {i}."} for i in range(60)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(tmp_path, model, name="run", **data):
    return make_run(tmp_path / name, {"source": "pairs", **data}, model={"path": str(model)})


def steps(folder):
    run_here(folder, "data")
    run_here(folder, "pairs")
    return read_json(folder / "data" / "done.json")["figures"], read_json(folder / "pairs" / "done.json")["figures"]
