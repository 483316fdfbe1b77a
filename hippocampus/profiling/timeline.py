"""A device's time, shared out among what ran: every instant belongs to somebody or is idle."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hippocampus.profiling.trace import Event


@dataclass(frozen=True)
class Timeline:
    """Nanoseconds of one device from the first event of the program to its last.

    Attributes:
      by_instruction: what each instruction had; of what ran side by side, equal parts.
      outside: something else ran alone, such as a transfer.
      idle_between: nothing ran between the last event of a step and the first of the next; None
        where the steps cannot be told apart.
      idle: nothing ran at all, the time between steps included.
      total: all of these.
    """

    by_instruction: dict[str, float]
    outside: float
    idle_between: float | None
    idle: float
    total: float


def share_out(events: Sequence[Event], belongs: Callable[[Event], bool], steps: int) -> Timeline:
    """Shares out the time of a device.

    On one line an event inside another hides it for as long. Lines that run at once get equal
    parts. Events that do not belong to the program get only what is left.

    Args:
      events: of one device, in any order; at least one belongs.
      belongs: whether an event is an instruction of the program.
      steps: how often the program ran.
    """
    own = [event for event in events if belongs(event)]
    begin, end = min(event.start for event in own), max(event.end for event in own)
    edges = []
    for event, is_own in [(event, True) for event in own] + [
            (event, False) for event in events if not belongs(event)]:
        start, stop = max(event.start, begin), min(event.end, end)
        if start < stop:
            edges += [(start, 1, -stop, event, is_own), (stop, 0, 0.0, event, is_own)]
    edges.sort(key=lambda edge: edge[:3])  # ends first; of what begins at once, the longest first
    spent: dict[str, float] = defaultdict(float)
    outside, idle = 0.0, 0.0
    stacks: dict[int, list[Event]] = {}
    now, others = begin, 0
    for time, is_start, _, event, is_own in edges:
        tops = [stack[-1] for stack in stacks.values() if stack]
        for top in tops:
            spent[top.instruction] += (time - now) / len(tops)
        if not tops and others:
            outside += time - now
        elif not tops:
            idle += time - now
        now = time
        if not is_own:
            others += 1 if is_start else -1
        elif is_start:
            stacks.setdefault(event.line, []).append(event)
        else:
            stacks[event.line].remove(event)
    return Timeline(dict(spent), outside, _between(own, steps), idle, end - begin)


def _between(own: Sequence[Event], steps: int) -> float | None:
    """Idle time before the first event of every step but the first."""
    runs = Counter(event.instruction for event in own)
    ordered = sorted(own, key=lambda event: event.start)
    first = next((e.instruction for e in ordered if runs[e.instruction] == steps), None)
    if first is None:
        return None
    idle, latest, seen = 0.0, ordered[0].start, False
    for event in ordered:
        if event.instruction == first:
            idle += max(0.0, event.start - latest) if seen else 0.0
            seen = True
        latest = max(latest, event.end)
    return idle
