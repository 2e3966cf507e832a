"""The schema of report.json: versioned, strict, and told in the documentation. All other tests validate against it."""

import copy
from pathlib import Path

import jsonschema
import pytest

from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.compare.stage import SCHEMA_VERSION
from tests.compare.helpers import SCHEMA, check_schema
from tests.compare.report.test_browser import small_report

DOCS = Path(__file__).parents[3] / "docs" / "compare.md"


@pytest.fixture(scope="module")
def schema():
    return read_json(SCHEMA)


def test_is_a_schema_of_this_version(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_every_key_is_described_and_documented(schema):
    text = DOCS.read_text()
    for key, value in schema["properties"].items():
        assert value.get("description"), key
        assert f"`{key}" in text, f"docs/compare.md does not name {key}"


def test_what_readers_rely_on_may_not_go_missing(schema):
    report = check_schema(small_report(["sft", "ppo"], ["gold"]))
    for path in (("pair_set", "hash"), ("policies", "sft", "gold_reward"), ("policies", "ppo", "kl", "mean")):
        broken = copy.deepcopy(report)
        part = broken
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        with pytest.raises(AssertionError, match=path[-1]):
            check_schema(broken)


def test_a_key_that_nobody_wrote_down_is_found(schema):
    report = small_report(["sft", "ppo"], ["gold"])
    with pytest.raises(AssertionError, match="surprise"):
        check_schema({**report, "surprise": 1})
