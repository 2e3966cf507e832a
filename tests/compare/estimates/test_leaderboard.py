"""AlpacaEval's full length-controlled model: alpaca_eval's own figures on the same data, digit by digit."""

import csv
import json

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.compare.estimates.annotations.__main__ import main
from ppo_vs_dpo.compare.estimates.annotations.figures import statistics_of
from ppo_vs_dpo.compare.estimates.annotations.reading import load_annotations, models_in
from ppo_vs_dpo.compare.estimates.length_control import (
    LEAST_SHARE,
    length_controlled,
    support_notes,
    support_of,
)
from ppo_vs_dpo.compare.statistics.leaderboard import fit_leaderboard, read_leaderboard

N = 120
# What alpaca_eval 0.6.6 (metrics.glm_winrate, scikit-learn 1.9.1) gives for `made_up`, with and without its gamed
# baselines: length_controlled_winrate and lc_standard_error. `test_alpaca_eval_itself` compares where it is installed.
EXPECTED = {
    "longer": {
        "length_controlled_v1": (60.571037671525595, 0.5142846142618076),
        "length_controlled_noreg": (61.830978202770105, 0.4162848113033706),
    },
    "shorter": {
        "length_controlled_v1": (35.08309374474477, 0.9222811118297605),
        "length_controlled_noreg": (35.68201608991785, 0.8476853125942063),
    },
}


def made_up(folder):
    """Annotations of two models with an injected length bias, and the leaderboard's two files."""
    rng = np.random.default_rng(7)
    hard = rng.normal(size=N)
    with (folder / "instruction_difficulty.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("index", "instruction_difficulty"), *enumerate(hard.tolist())])
    columns = ["index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"]
    with (folder / "df_gamed.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        for name, shift in (("verbose", -0.7), ("concise", 0.9)):
            length = rng.normal(shift, 1, N)
            p = 1 / (1 + np.exp(1.6 * np.tanh(length) - 0.7 * hard))
            shares = np.round(np.clip(p * rng.uniform(0.6, 1.2, N), 0, 1), 4)
            for i in range(N):
                writer.writerow([i, shares[i], length[i], hard[i], False, name])
    models = {}
    for name, skill, shift in (("longer", 0.3, 60), ("shorter", -1.0, -220)):
        ours, theirs = rng.integers(200, 400, N) + shift, rng.integers(200, 400, N)
        gap = ours - theirs
        p = 1 / (1 + np.exp(-(skill + 1.2 * np.tanh(gap / 100) + 0.6 * hard)))
        preference = np.where(rng.random(N) < p, 2.0, 1.0)
        preference[::17] = np.round(rng.uniform(1, 2, len(preference[::17])), 3)
        preference[5], preference[9] = 0.0, 1.5
        models[name] = [
            {
                "instruction": f"instruction {i}",
                "output_1": "b" * int(theirs[i]),
                "generator_1": "baseline",
                "output_2": "m" * int(max(1, ours[i])),
                "generator_2": name,
                "annotator": "a",
                "preference": None if i == 40 else float(preference[i]),
            }
            for i in range(N)
        ]
        (folder / f"{name}.json").write_text(json.dumps(models[name]))
    return models


@pytest.mark.parametrize("name", EXPECTED)
def test_the_figures_are_those_of_alpaca_eval(tmp_path, name):
    models = made_up(tmp_path)
    found = statistics_of(models[name], name, leaderboard=read_leaderboard([str(tmp_path)]))
    win_rate, error = EXPECTED[name]["length_controlled_v1"]
    assert found["length_controlled_win_rate"] == pytest.approx(win_rate, abs=1e-9)
    assert found["length_controlled_standard_error"] == pytest.approx(error, abs=1e-9)
    # Without the gamed baselines it is another model, and says so.
    bare = read_leaderboard([str(tmp_path / "instruction_difficulty.csv")])
    found = statistics_of(models[name], name, leaderboard=bare)
    assert found["length_controlled_win_rate"] is None
    assert found["length_controlled_unregularised_win_rate"] == pytest.approx(
        EXPECTED[name]["length_controlled_noreg"][0], abs=1e-9
    )
    assert "not its figure" in found["length_controlled_note"]
    # The gamed file knows the difficulties, too.
    gamed = read_leaderboard([str(tmp_path / "df_gamed.csv")])
    assert gamed.difficulty == pytest.approx(bare.difficulty)
    assert statistics_of(models[name], name, leaderboard=gamed)["length_controlled_win_rate"] == pytest.approx(
        win_rate
    )


def test_alpaca_eval_itself(tmp_path, monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    import pandas

    models = made_up(tmp_path)
    monkeypatch.setattr(glm, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    for name, rows in models.items():
        for model, expected in EXPECTED[name].items():
            options = {"save_weights_dir": None, "is_warn_extreme_changes": False}
            found = glm.get_length_controlled_winrate(pandas.DataFrame(rows), glm_name=model, **options)
            figures = (found["length_controlled_winrate"], found["lc_standard_error"])
            assert figures == pytest.approx(expected, abs=1e-9)


def test_the_command(tmp_path, capsys):
    made_up(tmp_path)
    files = [str(tmp_path / "longer.json"), str(tmp_path / "shorter.json")]
    assert main([*files, "--json", "--leaderboard", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, expected in EXPECTED.items():
        figure = found[name]["length_controlled_win_rate"]
        assert figure == pytest.approx(expected["length_controlled_v1"][0], abs=1e-9)
        assert figure != pytest.approx(found[name]["length_controlled_minimal_win_rate"], abs=0.5)
    assert main([*files, "--leaderboard", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{EXPECTED['longer']['length_controlled_v1'][0]:.2f}" in said
    assert "extrapolation" in said
    # Rows in another order, and some missing: the other file tells which instruction is which.
    rows = json.loads((tmp_path / "longer.json").read_text())
    (tmp_path / "longer.json").write_text(json.dumps(rows[::-1]))
    assert main([*files, "--json", "--leaderboard", str(tmp_path)]) == 0


def test_rows_that_do_not_say_which_instruction_they_are_of(tmp_path, capsys):
    models = made_up(tmp_path)
    board = read_leaderboard([str(tmp_path)])
    whole = statistics_of(models["longer"], "longer", leaderboard=board)["length_controlled_win_rate"]
    numbers = {row["instruction"]: i for i, row in enumerate(models["longer"])}
    shuffled = models["longer"][60:] + models["longer"][:60]
    found = statistics_of(shuffled, "longer", leaderboard=board, numbers=numbers)
    # Folds of the cross-validation are others; the fit is the same.
    assert found["length_controlled_win_rate"] == pytest.approx(whole, abs=0.5)
    with pytest.raises(UserError, match="119 annotations, and the leaderboard's difficulties are of 120 instructions"):
        statistics_of(models["longer"][1:], "longer", leaderboard=board)
    some = statistics_of(models["longer"][1:], "longer", leaderboard=board, numbers=numbers)
    assert some["length_controlled_win_rate"] == pytest.approx(whole, abs=3)
    with pytest.raises(UserError, match="entry 0: no difficulty is known of its instruction"):
        statistics_of([{**models["longer"][0], "instruction": "else"}], "longer", leaderboard=board, numbers=numbers)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds neither"):
        read_leaderboard([str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        read_leaderboard([str(tmp_path / "none.csv")])
    bad = tmp_path / "instruction_difficulty.csv"
    bad.write_text("index,difficulty\n0,1\n")
    with pytest.raises(UserError, match="no column instruction_difficulty; it has index, difficulty"):
        read_leaderboard([str(bad)])
    bad.write_text("index,instruction_difficulty\n0,x\n")
    with pytest.raises(UserError, match="'x' in column instruction_difficulty is no number"):
        read_leaderboard([str(bad)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="could not be had from the Hub"):
        read_leaderboard(["hub"])
    with pytest.raises(ValueError, match="too few"):
        fit_leaderboard(np.ones(5), np.arange(5.0), np.zeros(5), None)
    with pytest.raises(ValueError, match="all length differences are equal"):
        fit_leaderboard(np.ones(20), np.ones(20), np.zeros(20), None)


# --- support -----------------------------------------------------------------------------------------------
def test_support_is_the_thinner_side():
    assert support_of(np.array([-3, -2, 1, 4])) == 0.5
    assert support_of(np.array([-3, -2, -1, 4])) == 0.25
    assert support_of(np.array([-3, -2, 0, 0])) == 0.5
    assert support_of(np.array([1, 2, 3])) == 0.0
    assert support_of(np.zeros(4)) == 1.0
    assert support_of(np.array([])) == 0.0


def test_a_figure_says_when_it_extrapolates():
    rng = np.random.default_rng(0)
    wins = (rng.random(200) < 0.3).astype(float)
    outside = rng.integers(1, 50, 200).astype(float)
    with pytest.raises(ValueError, match="lengths do not overlap"):
        length_controlled(wins, outside)
    told = length_controlled(wins, outside, extrapolate=True)
    assert told.support == 0.0
    assert "lengths do not overlap" in told.extrapolates
    inside = length_controlled(wins, rng.integers(-50, 50, 200).astype(float))
    assert inside.support > 0.4
    assert inside.extrapolates is None
    entries = [
        {"policy": "a", "versus": "b", "length_controlled": None, "length_support": 0.01},
        {"policy": "a", "versus": "c", "length_controlled": {"win_rate": 0.5}, "length_support": 0.4},
        {"policy": "a", "versus": "d", "length_controlled": None, "length_support": 0.5},
        {"policy": "a", "versus": "e", "length_controlled": None},
    ]
    (note,) = support_notes(entries)
    assert "1 of 3 length-controlled win rates are refused" in note
    assert "a against b, 1.0 % on the other side" in note
    assert support_notes(entries[1:]) == []


@pytest.mark.real_data
def test_real_models_that_the_minimal_model_gets_wrong(real_data):
    """19.6 where the leaderboard says 5.9, 37.8 where it says 19.3: their answers are nearly always shorter."""
    folder = real_data / "alpaca_eval"
    published = json.loads((folder / "leaderboard_verbosity.json").read_text())
    for name in ("alpaca-7b", "gpt-3.5-turbo-1106"):
        rows = models_in(load_annotations(folder / f"{name}.json.gz"), f"{name}.json.gz")[name]
        found = statistics_of(rows)
        off = found["length_controlled_minimal_win_rate"] - published[name]["length_controlled_winrate"]
        assert off > 10
        assert found["length_support"] < LEAST_SHARE
        assert found["length_controlled_minimal_extrapolates"]
        assert found["length_controlled_win_rate"] is None
    name = "FuseChat-Llama-3.2-1B-Instruct"
    rows = models_in(load_annotations(folder / f"{name}.json.gz"), f"{name}.json.gz")[name]
    assert not statistics_of(rows)["length_controlled_minimal_extrapolates"]
