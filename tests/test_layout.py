"""The tests' own files: what pytest and the order of tests/long_files.py take for granted."""

from collections import Counter
from pathlib import Path

import long_files

TESTS = Path(__file__).resolve().parent


def test_no_two_modules_share_a_name():
    # Folders of tests are no packages, so that a second file of a name is never collected.
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_files_begun_first_exist():
    assert [name for name in long_files.FILES if not (TESTS / name).is_file()] == []
