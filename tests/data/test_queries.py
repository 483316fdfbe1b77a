"""Generated queries: the same for a seed, each prompt once, and answers that the prompt implies."""

import json
import re
from collections import Counter

import pytest

from hippocampus.data.queries import (
    CATEGORIES,
    WRITTEN,
    cloze,
    digest,
    make_queries,
    read_queries,
)
from hippocampus.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def queries():
    return make_queries(1000, seed=0)


def asked(query):
    """The question itself, without the one that is shown with its answer."""
    return query.prompt.split("Question: ")[-1].removesuffix("\nAnswer:")


def of(queries, *kinds):
    found = [query for query in queries if query.kind in kinds]
    assert found
    return found


def test_every_category_has_as_many_and_no_prompt_is_there_twice(queries):
    assert Counter(query.category for query in queries) == dict.fromkeys(CATEGORIES, 200)
    assert len({query.prompt for query in queries}) == len(queries) == 1000
    assert Counter(q.category for q in make_queries(7)) == dict(zip(CATEGORIES, (2, 2, 1, 1, 1),
                                                                    strict=True))


def test_queries_depend_on_their_seed_alone(queries):
    assert make_queries(1000, seed=0) == queries
    other = make_queries(1000, seed=1)
    assert digest(other) != digest(queries)
    assert len({q.prompt for q in queries} & {q.prompt for q in other}) < 100
    # More of them begin with the same ones.
    assert make_queries(50, seed=0)[:10] == queries[:10]
    # These bytes are named in results.
    assert digest(queries)[:12] == "005cc30b65ac"


def test_arithmetic_is_right(queries):
    for query in of(queries, "sum", "difference", "product"):
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", asked(query)).groups()
        a, b = int(a), int(b)
        assert query.answers == (str({"+": a + b, "-": a - b, "*": a * b}[sign]),)
    for query in of(queries, "larger"):
        assert query.answers == (str(max(map(int, re.findall(r"\d+", asked(query))))),)
    for query in of(queries, "price"):
        price, n = map(int, re.findall(r"\d+", asked(query)))
        assert query.answers[0] == str(price * n)


def test_what_is_looked_up_stands_in_the_prompt(queries):
    for query in of(queries, "home", "who", "colour", "nth", "after", "code", "list"):
        assert query.answers[0] in asked(query)
    for query in of(queries, "home", "code"):
        name = re.search(r"(?:does|code of) (\w+)(?: live)?\?", asked(query))[1]
        told = re.search(rf"{name} (?:lives in|is) (\w+)\.", asked(query))[1]
        assert query.answers[0] == told
    for query in of(queries, "nth"):
        items = re.search(r"Remember: (.*?)\. ", asked(query))[1].split(", ")
        place = ("first", "second", "third", "fourth", "fifth").index(
            re.search(r"the (\w+) thing", asked(query))[1])
        assert query.answers[0] == items[place]


def test_sequences_go_on_by_their_rule(queries):
    for query in of(queries, "numbers"):
        shown = [int(n) for n in re.findall(r"\d+", asked(query))]
        assert len({b - a for a, b in zip(shown, [*shown[1:], int(query.answers[0])],
                                          strict=True)}) == 1
    for query in of(queries, "doubled"):
        shown = [int(n) for n in re.findall(r"\d+", asked(query))]
        assert int(query.answers[0]) * shown[0] == shown[-1] * shown[1]
    for query in of(queries, "letters"):
        shown = re.findall(r"\b[A-Z]\b", asked(query))
        assert len({ord(b) - ord(a) for a, b in zip(shown, [*shown[1:], query.answers[0]],
                                                    strict=True)}) == 1


def test_the_example_never_is_the_question(queries):
    for query in queries:
        if query.category in WRITTEN:
            example = query.prompt.split("Question: ")[1].split("\nAnswer:")[0]
            assert example.strip() != asked(query)
            assert query.prompt == query.prompt.rstrip()


def test_a_tale_is_cut_between_sentences():
    found = list(cloze(["One came. Two  went!\nThree sat? Four."]))
    assert [(q.prompt, q.answers) for q in found] == [
        ("One came.", ("Two went!",)), ("One came. Two went!", ("Three sat?",)),
        ("One came. Two went! Three sat?", ("Four.",))]
    for query in make_queries(500):
        if query.category == "creative":
            assert query.prompt[-1] in ".!?" and query.answers[0][-1] in ".!?"
            assert "{" not in query.prompt + query.answers[0]


def test_queries_of_ones_own_are_read(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"category": "memory", "prompt": "a b c. b? ", "answer": " b"})
                    + "\n\n" + json.dumps({"category": "creative", "kind": "ode", "prompt": "O",
                                           "answers": ["moon", "sun"]}) + "\n")
    first, second = read_queries(path)
    assert (first.category, first.prompt, first.answers) == ("memory", "a b c. b?", ("b",))
    assert (second.kind, second.answers) == ("ode", ("moon", "sun"))


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2 is no JSON"), ("[1]", "the category is None"),
    ('{"category": "poetry", "prompt": "a", "answer": "b"}', "the category is 'poetry'"),
    ('{"category": "memory", "prompt": " ", "answer": "b"}', "line 2 is no query"),
    ('{"category": "memory", "prompt": "a", "answers": []}', "line 2 is no query"),
    ('{"category": "memory", "prompt": "a", "answers": ["b", 1]}', "line 2 is no query")])
def test_a_line_that_is_no_query_is_named(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"category": "memory", "prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as refused:
        read_queries(path)
    assert message in str(refused.value)


def test_no_queries_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for path in ("empty.jsonl", "none.jsonl"):
        with pytest.raises(DataError):
            read_queries(tmp_path / path)
    with pytest.raises(ConfigError, match="4 queries"):
        make_queries(4)
