"""The committed checkpoints, loaded once."""

import functools
import os
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


@pytest.fixture(scope="session")
def real_data():
    """name -> a file or folder of real weights or text, which may be absent."""
    default = Path(__file__).resolve().parents[2] / "../shared/data"

    def find(name):
        path = Path(os.environ.get("HIPPOCAMPUS_DATA") or default) / name
        if not path.exists():
            pytest.skip(f"no {name} in $HIPPOCAMPUS_DATA or ../shared/data")
        return path

    return find
