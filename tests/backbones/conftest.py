"""The committed checkpoints, loaded once."""

import functools
from pathlib import Path

import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def folder_of():
    """family -> the folder of its tiny random checkpoint."""
    return lambda family: FIXTURES / family


@pytest.fixture(scope="session")
def backbone_of():
    """family -> its tiny random checkpoint; the same object every time."""
    from hippocampus.backbones.loading import load_backbone

    return functools.cache(lambda family: load_backbone(FIXTURES / family))


@pytest.fixture(scope="session")
def reference_of():
    """family -> what transformers says of it: `ids`, `logits` and `generated`."""
    return functools.cache(lambda family: dict(np.load(FIXTURES / family / "reference.npz")))
