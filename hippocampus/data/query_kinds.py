"""The kinds of questions whose answer is computed: name -> a function of a random generator."""

from __future__ import annotations

import calendar
import datetime
import random
import string
from dataclasses import dataclass

from hippocampus.data.query_tales import NAMES, THINGS

TOWNS = ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito", "Dublin", "Vienna")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_DAYS, _MONTHS = tuple(calendar.day_name), tuple(calendar.month_name)[1:]


@dataclass(frozen=True)
class Asked:
    """A question and its right answers, all of which say the same."""

    question: str
    answers: tuple[str, ...]


def _one(question: str, answer: object) -> Asked:
    return Asked(question, (str(answer),))


def _sum(draw: random.Random) -> Asked:
    a, b = draw.randrange(10, 500), draw.randrange(10, 500)
    return _one(f"What is {a} + {b}?", a + b)


def _difference(draw: random.Random) -> Asked:
    a, b = draw.randrange(10, 500), draw.randrange(10, 500)
    return _one(f"What is {a + b} - {a}?", b)


def _product(draw: random.Random) -> Asked:
    a, b = draw.randrange(2, 30), draw.randrange(2, 30)
    return _one(f"What is {a} * {b}?", a * b)


def _larger(draw: random.Random) -> Asked:
    a, b = draw.sample(range(10, 1000), 2)
    return _one(f"Which number is larger, {a} or {b}?", max(a, b))


def _price(draw: random.Random) -> Asked:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    n, price = draw.randrange(2, 13), draw.randrange(2, 40)
    return Asked(f"One {thing} costs {price} coins. {name} buys {n} of that kind. How many coins "
                 "is that?", (str(n * price), f"{n * price} coins"))


def _home(draw: random.Random) -> Asked:
    names, towns = draw.sample(NAMES, 3), draw.sample(TOWNS, 3)
    told = " ".join(f"{name} lives in {town}." for name, town in zip(names, towns, strict=True))
    at = draw.randrange(3)
    return Asked(f"{told} In which town does {names[at]} live?", (towns[at], f"in {towns[at]}"))


def _who(draw: random.Random) -> Asked:
    names, towns = draw.sample(NAMES, 3), draw.sample(TOWNS, 3)
    told = " ".join(f"{name} lives in {town}." for name, town in zip(names, towns, strict=True))
    at = draw.randrange(3)
    return _one(f"{told} Who lives in {towns[at]}?", names[at])


def _colour(draw: random.Random) -> Asked:
    things, colours = draw.sample(THINGS, 3), draw.sample(COLOURS, 3)
    told = " ".join(f"The {thing} is {colour}."
                    for thing, colour in zip(things, colours, strict=True))
    at = draw.randrange(3)
    return _one(f"{told} What colour is the {things[at]}?", colours[at])


def _weekday(draw: random.Random) -> Asked:
    known = datetime.date(2000, 1, 1) + datetime.timedelta(draw.randrange(10_000))
    asked = known + datetime.timedelta(draw.randrange(1, 6))

    def said(date: datetime.date) -> str:
        return f"{date.day} {_MONTHS[date.month - 1]} {date.year}"

    return _one(f"{said(known)} is a {_DAYS[known.weekday()]}. Which day of the week is "
                f"{said(asked)}?", _DAYS[asked.weekday()])


def _true(draw: random.Random) -> Asked:
    names, towns = draw.sample(NAMES, 2), draw.sample(TOWNS, 2)
    claimed = draw.randrange(2)
    return _one(f"{names[0]} lives in {towns[0]}. {names[1]} lives in {towns[1]}. Does {names[0]} "
                f"live in {towns[claimed]}, yes or no?", "no" if claimed else "yes")


def _nth(draw: random.Random) -> Asked:
    items, at = draw.sample(THINGS, 5), draw.randrange(5)
    return Asked(f"Remember: {', '.join(items)}. The rain went on all night. What was the "
                 f"{_ORDINALS[at]} thing?", (items[at], f"the {items[at]}"))


def _after(draw: random.Random) -> Asked:
    items, at = draw.sample(THINGS, 5), draw.randrange(4)
    return Asked(f"Remember: {', '.join(items)}. The road was long. What came right after the "
                 f"{items[at]}?", (items[at + 1], f"the {items[at + 1]}"))


def _code(draw: random.Random) -> Asked:
    names, codes = draw.sample(NAMES, 3), draw.sample(range(1000, 10_000), 3)
    told = " ".join(f"The code of {name} is {code}."
                    for name, code in zip(names, codes, strict=True))
    at = draw.randrange(3)
    return _one(f"{told} The door was shut again. What is the code of {names[at]}?", codes[at])


def _list(draw: random.Random) -> Asked:
    items = draw.sample(THINGS, 3)
    return _one(f"Remember: {', '.join(items)}. Then we had tea. What were the things, in order?",
                ", ".join(items))


def _numbers(draw: random.Random) -> Asked:
    first, step = draw.randrange(1, 60), draw.randrange(2, 15)
    shown = [first + step * n for n in range(5)]
    return _one(f"What comes next: {', '.join(map(str, shown))}?", first + 5 * step)


def _doubled(draw: random.Random) -> Asked:
    first, factor = draw.randrange(1, 40), draw.choice((2, 3))
    shown = [first * factor**n for n in range(4)]
    return _one(f"What comes next: {', '.join(map(str, shown))}?", first * factor**4)


def _letters(draw: random.Random) -> Asked:
    step = draw.randrange(1, 4)
    first = draw.randrange(26 - 5 * step)
    shown = string.ascii_uppercase[first : first + 5 * step + 1 : step]
    return _one(f"What comes next: {', '.join(shown[:-1])}?", shown[-1])


def _calendar(draw: random.Random) -> Asked:
    names, step = draw.choice((_DAYS, _MONTHS)), draw.randrange(1, 3)
    first = draw.randrange(len(names))
    shown = [names[(first + step * n) % len(names)] for n in range(5)]
    return _one(f"What comes next: {', '.join(shown[:4])}?", shown[4])


def _pattern(draw: random.Random) -> Asked:
    length, words = draw.randrange(2, 4), draw.choice((COLOURS, THINGS))
    unit = draw.sample(words, length)
    shown = [unit[n % length] for n in range(2 * length + draw.randrange(length) + 1)]
    return _one(f"What comes next: {', '.join(shown[:-1])}?", shown[-1])


MATHEMATICAL = {"sum": _sum, "difference": _difference, "product": _product, "larger": _larger,
                "price": _price}
FACTUAL = {"home": _home, "who": _who, "colour": _colour, "weekday": _weekday, "true": _true}
MEMORY = {"nth": _nth, "after": _after, "code": _code, "list": _list}
SEQUENTIAL = {"numbers": _numbers, "doubled": _doubled, "letters": _letters,
              "calendar": _calendar, "pattern": _pattern}
