"""Fixtures of the comparison's tests."""

import pytest

from tests.compare.server import KEY, Server


@pytest.fixture
def serve(monkeypatch):
    """Start servers that are stopped at the end."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    started = []

    def start(answer, **options):
        started.append(Server(answer, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()
