"""What tests of planning share."""

import pytest

from hippocampus.compilation_cache import FOLDER
from hippocampus.planning import topology


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    """Planning sets variables; here into an environment of its own, in which nothing is kept."""
    monkeypatch.setattr(topology.os, "environ", {FOLDER: "off"})
