"""The campaign of faults in its short form: the same program, fewer cases (`make faults` for all)."""

import pytest

from tests.faults import kills, spoilt, wrong_settings


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again(tmp_path, ranks):
    tally = kills.campaign(tmp_path, seed=1, kills=6, ranks=ranks)
    assert tally.kills == 6
    assert tally.lost == []
    assert tally.orphans == []
    assert tally.hangs == []
    assert tally.leftovers == []
    assert tally.paid_twice == 0
    assert tally.tracebacks == 0


@pytest.mark.slow
def test_spoilt_files_are_named_or_made_again(tmp_path):
    found = spoilt.campaign(tmp_path, some=11)
    assert found["tracebacks"] == []
    assert found["other"] == []
    assert found["mended"]


@pytest.mark.slow
def test_wrong_settings_are_refused_before_a_stage_starts():
    found = wrong_settings.campaign(some=4)
    assert found["taken"] == []
    assert len(found["refused"]) > 40
