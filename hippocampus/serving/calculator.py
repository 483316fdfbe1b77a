"""Exact arithmetic on an expression that nobody vouches for: `calculate`, `evaluate`, `exact_text`.

Numbers are fractions, so 0.1 + 0.2 is 0.3 and a third stays a third. The expression is read into
Python's syntax tree and never run: a tree of few nodes, of whole kinds that are named here, over
numbers whose size is known before they are computed.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from hippocampus.errors import ConfigError

LONGEST = 1000
"""Characters of an expression."""
DEEPEST = 100
"""Levels of its tree, brackets included."""
LARGEST_BITS = 4096
"""Bits of a numerator or a denominator, at any moment."""
_LONGEST_DECIMAL = 60
"""Places behind the point that are written out; what needs more is written as a fraction."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?(?![\w.])"
_TOKENS = re.compile(rf"(?:\s|{_NUMBER}|[A-Za-z]+(?!\w)|\*\*|//|[-+*/%(),])*", re.ASCII)
# Signs of print: times, middle dot, division, minus, dash.
_SAME = str.maketrans({0xD7: "*", 0xB7: "*", 0xF7: "/", 0x2212: "-", 0x2013: "-"})
_HINT = "use numbers, + - * / // % ** and brackets, and abs, ceil, floor, gcd, lcm, max, min, round"


def calculate(expression: str) -> str:
    """The exact value of an arithmetic expression, as text.

    Args:
      expression: such as "2 * (3 + 0.5) ** 2"; `^` is a power.

    Returns:
      A whole number, a decimal that ends, or else a fraction such as 1/3.

    Raises:
      ConfigError: it is no arithmetic, has no value, or is more than is worth computing.
    """
    return exact_text(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression; see `calculate`."""
    if not isinstance(expression, str) or not expression.strip():
        raise ConfigError("there is no expression", _HINT)
    if len(expression) > LONGEST:
        raise ConfigError(f"an expression of {len(expression)} characters",
                          f"at most {LONGEST} are read")
    source = " ".join(expression.translate(_SAME).replace("^", "**").split())
    known = _TOKENS.match(source)
    if known is None or known.end() < len(source):
        at = known.end() if known else 0
        raise ConfigError(f"{source[at:at + 12]!r} is no arithmetic", _HINT)
    depth = 0
    for character in source:  # the parser would stop at its own limit, with errors of its own
        depth += (character == "(") - (character == ")")
        if depth > DEEPEST:
            raise ConfigError(f"more than {DEEPEST} brackets inside each other", "use fewer")
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ConfigError(f"{source[:40]!r} is no arithmetic", _HINT) from None
    try:
        return _value(tree, source, 0)
    except ZeroDivisionError:
        raise ConfigError("a division by zero", "it has no value") from None


def exact_text(value: Fraction) -> str:
    """A number so that `Fraction(text)` is the number: 12, 0.125 or 1/3."""
    rest, places = value.denominator, 0
    for prime in (2, 5):
        times = 0
        while rest % prime == 0:
            rest, times = rest // prime, times + 1
        places = max(places, times)
    if rest > 1 or places > _LONGEST_DECIMAL:
        return str(value)
    if not places:
        return str(value.numerator)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _value(node: ast.expr, source: str, depth: int) -> Fraction:
    if depth > DEEPEST:
        raise ConfigError("an expression of too many levels", "split it into several")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # Not the node's own value, in which 0.1 is a float already.
        return _bounded(Fraction(source[node.col_offset:node.end_col_offset]))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        inner = _value(node.operand, source, depth + 1)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        # A long sum leans to the left: it is walked, and only the other side is a level.
        chain: list[ast.BinOp] = []
        first: ast.expr = node
        while isinstance(first, ast.BinOp) and type(first.op) in _OPERATIONS:
            chain.append(first)
            first = first.left
        value = _value(first, source, depth + 1)
        for one in reversed(chain):
            other = _value(one.right, source, depth + 1)
            value = _bounded(Fraction(_OPERATIONS[type(one.op)](value, other)))
        return value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        values = [_value(argument, source, depth + 1) for argument in node.args]
        return _bounded(_call(node.func.id, values))
    raise ConfigError(f"{ast.get_source_segment(source, node) or source:.40} is no arithmetic",
                      _HINT)


def _call(name: str, values: list[Fraction]) -> Fraction:
    if name not in _FUNCTIONS:
        raise ConfigError(f"there is no function {name[:40]}", _HINT)
    least, most, function = _FUNCTIONS[name]
    if not least <= len(values) <= most:
        raise ConfigError(f"{name} of {len(values)} numbers",
                          f"it takes {least}" + (f" to {most}" if most > least else ""))
    return Fraction(function(*values))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ConfigError(f"a power of {exact_text(exponent)}", "exact powers are whole numbers")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (-1, 0, 1) and size * abs(exponent.numerator) > 2 * LARGEST_BITS:
        raise ConfigError("a power that is too large", f"at most {LARGEST_BITS} bits are computed")
    if base in (-1, 0, 1):  # whatever the exponent: its size says nothing about the result's
        exponent = Fraction(min(exponent, 2 + exponent % 2) if exponent >= 0
                            else max(exponent, -2 - exponent % 2))
    return Fraction(base ** exponent.numerator)


def _round(value: Fraction, places: Fraction = Fraction(0)) -> Fraction:
    if places.denominator != 1 or abs(places) > _LONGEST_DECIMAL:
        raise ConfigError(f"round to {exact_text(places)} places",
                          f"it takes whole numbers up to {_LONGEST_DECIMAL}")
    return Fraction(round(value, int(places)))


def _whole(value: Fraction) -> int:
    if value.denominator != 1:
        raise ConfigError(f"{exact_text(value)} is no whole number", "gcd and lcm need such")
    return value.numerator


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise ConfigError("a number that is too large", f"at most {LARGEST_BITS} bits are computed")
    return value


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: _power}
_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Fraction | int]]] = {
    "abs": (1, 1, abs), "ceil": (1, 1, math.ceil), "floor": (1, 1, math.floor),
    "gcd": (2, 8, lambda *values: math.gcd(*map(_whole, values))),
    "lcm": (2, 8, lambda *values: math.lcm(*map(_whole, values))),
    "max": (1, 99, lambda *values: max(values)), "min": (1, 99, lambda *values: min(values)),
    "round": (1, 2, _round)}
