"""The measurement tells right from wrong."""

import math
import types

from hippocampus.serving.calculator import calculate
from hippocampus.serving.documents import Documents
from hippocampus.serving.tool_questions import questions, score
from hippocampus.serving.tool_trace import Call
from hippocampus.serving.tools import ToolResponse


def result(name, arguments, output, ok=True):
    return types.SimpleNamespace(tool_calls=[Call(name, arguments, "")], tool_responses=[
        ToolResponse(name, arguments, ok, output, "" if ok else "tool")])


def test_every_question_can_be_answered_with_its_tool():
    asked, documents = questions(40, seed=1)
    folder = Documents(documents)
    assert len({one.text for one in asked}) == 80
    for one in asked:
        if one.kind == "arithmetic":
            assert calculate(one.text.removeprefix("What is ").rstrip("?")) == one.answer
        else:
            assert one.answer in folder.search(one.text, 1)[0].text
    assert questions(40, seed=1) == (asked, documents) != questions(40, seed=2)


def test_right_and_wrong_answers_calls_and_results_are_told_apart():
    asked, _ = questions(2)
    right = [one.answer for one in asked]
    texts = [f"It is {right[0]}.", f"{right[1]} or 1", "I do not know", f"In the year {right[3]}"]
    results = [result("calculate", {"expression": "1/3"}, "1/3"),
               result("calculate", {"expression": "1/0"}, "0"),
               result("search", {"query": "a"}, "[]"), result("verify", {"claim": "a"}, "{}")]
    found = score(asked, texts, results)
    assert (found["arithmetic"].answered, found["look-up"].answered) == (0.5, 0.5)
    assert (found["arithmetic"].selected, found["look-up"].selected) == (1.0, 0.5)
    assert found["arithmetic"].exact == 0.5 and math.isnan(found["look-up"].exact)
    assert score(asked, right)["arithmetic"].answered == 1.0
