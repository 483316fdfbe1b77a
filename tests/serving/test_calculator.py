"""The calculator is exact, and survives whatever it is given."""

import random
import time
from fractions import Fraction

import pytest

from hippocampus.errors import ConfigError
from hippocampus.serving.calculator import LARGEST_BITS, calculate, evaluate, exact_text


@pytest.mark.parametrize(("expression", "value"), [
    ("2 * (3 + 0.5) ** 2", "24.5"), ("0.1 + 0.2", "0.3"), ("1/3", "1/3"), ("1/3 + 2/3", "1"),
    ("2^10", "1024"), ("-2**2", "-4"), ("2**-3", "0.125"), ("2**3**2", "512"), ("7 // 2", "3"),
    ("-7 // 2", "-4"), ("7 % -3", "-2"), ("8 \xd7 2 \xf7 4 \u2212 1", "3"), ("1e3 + .5", "1000.5"),
    ("-0.05", "-0.05"), ("max(1, 2.5, 2)", "2.5"),
    ("min(3) + max(4)", "7"), ("round(2.345, 2)", "2.34"),
    ("gcd(12, 18)", "6"), ("lcm(4, 6)", "12"), ("floor(-1/2) + ceil(1/2) + abs(-3)", "3"),
    ("(-1)**99999999", "-1"),
    ("(-1)**-4", "1"), ("0**0", "1"), ("0**99999999", "0"), ("(-1)**-99999999", "-1"),
    ("+".join(["1"] * 400), "400"), ("1\n+ 2", "3"),
    ("12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900")])
def test_a_value_is_exact(expression, value):
    assert calculate(expression) == value


def test_random_expressions_have_the_value_that_fractions_give():
    rng = random.Random(0)
    for _ in range(300):
        text, value = str(n := rng.randrange(1, 99)), Fraction(n)
        for _ in range(rng.randrange(1, 6)):
            n, operator = rng.randrange(1, 50), rng.choice("+-*/")
            value = {"+": value + n, "-": value - n, "*": value * n, "/": value / n}[operator]
            text = f"({text}) {operator} {n}"
        assert evaluate(text) == value
        assert Fraction(calculate(text)) == value


@pytest.mark.parametrize("hostile", [
    "9**9**9", "9^9^9^9", "(9**999)**999", "2**-99999", "(1/9)**9999", "1e1000", "1e-999**9",
    "9" * 1001, "9" * 9999, "__import__('os').system('id')", "().__class__", "(1).real", "1 .real",
    "(" * 300 + "1" + ")" * 300, "(" * 300, "-" * 900 + "1", "2" + "**1" * 300, "[1]*9", "'a'*9",
    "1 if 1 else 2", "lambda: 1", "abs", "abs(abs)", "open(1)", "max(*a)", "abs(x=1)", "1_000",
    "0x10", "1j", "1 and 2", "1 < 2", "a", "1, 2", "()", "", "   ", "1 +", "1\0+1", "\u0661+1",
    "f(1)",
    "1/0", "1//0", "1%0", "0**-1", "2**0.5", "round(1, 1/2)", "round(1, 99999)", "gcd(1/2, 1)",
    "abs(1, 2)", "max()", "1 # 2", "1;2", "1:=2", "True", "None", "...", "1...real", "007",
    "*".join(["9**99"] * 99), "round(1, -61)", "max(" + "1," * 100 + "1)", None, 3, ["1"]])
def test_what_is_hostile_or_has_no_value_ends_in_one_line_at_once(hostile):
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        calculate(hostile)
    assert caught.value.message and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.perf_counter() - start < 2


def test_a_number_as_large_as_allowed_is_computed_and_written():
    assert evaluate(f"2**{LARGEST_BITS - 1}") == 2 ** (LARGEST_BITS - 1)
    with pytest.raises(ConfigError, match="too large"):
        evaluate(f"2**{LARGEST_BITS - 1} * 2")
    assert exact_text(Fraction(1, 2**61)) == f"1/{2**61}"
    assert Fraction(exact_text(Fraction(-7, 2**60))) == Fraction(-7, 2**60)


def test_brackets_are_counted_before_anything_is_parsed():
    assert calculate("(" * 100 + "1" + ")" * 100) == "1"
    with pytest.raises(ConfigError, match="more than 100 brackets"):
        calculate("(" * 101 + "1" + ")" * 101)
