"""A model with a memory, and a file in which it keeps a story."""

import pytest
from conversations import STORY, language_model


@pytest.fixture(scope="session")
def lm():
    return language_model()


@pytest.fixture
def told(lm, tmp_path):
    """A file in which the story is."""
    lm.remember(STORY, memory=tmp_path / "ann.memory")
    return tmp_path / "ann.memory"
