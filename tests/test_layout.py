"""The tests' own files: what pytest and the order of tests/long_files.py take for granted."""

from collections import Counter
from pathlib import Path

import full_only
import long_files

TESTS = Path(__file__).resolve().parent


def test_no_two_modules_share_a_name():
    # Folders of tests are no packages, so that a second file of a name is never collected.
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_files_begun_first_exist():
    assert [name for name in long_files.FILES if not (TESTS / name).is_file()] == []


def test_every_test_of_which_some_cases_are_slow_exists_and_has_quick_ones(request):
    """Where all cases were collected: not in a run of some tests alone."""
    cases = {}
    for item in request.session.items:
        test, case = full_only.parts(item.nodeid)
        cases.setdefault(test, []).append(case)
    for test, patterns in full_only.QUICK.items():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS / path).read_text("utf-8"), test
        if test in cases and len(cases[test]) > 1:
            for pattern in patterns:
                assert full_only.fnmatch.filter(cases[test], pattern), (test, pattern)
            assert any(full_only.is_full_only(test, case) for case in cases[test]), test
