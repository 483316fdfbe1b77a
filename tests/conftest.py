"""What several test folders share: the `--full` lane and the data that may be absent."""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --full"))


@pytest.fixture(scope="session")
def tinyshakespeare_path() -> Path:
    default = Path(__file__).resolve().parents[1] / "../shared/data"
    path = Path(os.environ.get("HIPPOCAMPUS_DATA") or default) / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"no {path.name} in $HIPPOCAMPUS_DATA or ../shared/data")
    return path
