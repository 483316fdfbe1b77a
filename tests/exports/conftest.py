"""One run and its export, which tests copy before they damage it."""

import shutil

import pytest
import tiny_run


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    from hippocampus.evaluation.export_run import Request, export_run

    out = tmp_path_factory.mktemp("exported") / "tiny"
    export_run(tiny_run.trained(), out, Request())
    return out


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, tmp_path / "copy")
