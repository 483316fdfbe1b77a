"""What came of a text that was written with tools: `ToolText`, `ToolBatch`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hippocampus.serving.tools import ToolResponse


@dataclass(frozen=True)
class Call:
    """A call that a model wrote.

    Attributes:
      name, arguments: what it asks for; "" and {} where it could not be read.
      content: as it was written.
    """

    name: str
    arguments: dict[str, Any]
    content: str


@dataclass(frozen=True)
class Step:
    """One step of a text.

    Attributes:
      kind: "prompt" and "response" were read, "text" and "call" were written.
      text: of the tokens.
      tokens: the ids.
    """

    kind: Literal["prompt", "text", "call", "response"]
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ToolText:
    """A text that was written with tools.

    Attributes:
      text: what the model wrote beside its calls.
      tool_calls, tool_responses: one of each for every call, in their order.
      trace: everything that was read and written; its tokens together are what the caches hold,
        but for the last one, which may not have been read.
      finish: "stop", "length", or "calls" when the model went on calling beyond the budget.
      seconds: from the prompt to the end, calls included.
      written: tokens that the model drew.
    """

    text: str
    tool_calls: tuple[Call, ...]
    tool_responses: tuple[ToolResponse, ...]
    trace: tuple[Step, ...]
    finish: Literal["stop", "length", "calls"]
    seconds: float
    written: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """All ids, in their order."""
        return tuple(index for step in self.trace for index in step.tokens)


@dataclass(frozen=True)
class BatchSummary:
    """Of several texts.

    Attributes:
      texts, calls: how many.
      failures: calls whose answer is not ok.
      failures_by_kind: `ToolResponse.failure` -> how many.
      mean_latency_s, max_latency_s: seconds of a call; NaN without one.
      seconds, tokens: all texts together, and tokens that were drawn.
      tokens_per_second: drawn, while no tool was waited for.
    """

    texts: int
    calls: int
    failures: int
    failures_by_kind: dict[str, int]
    mean_latency_s: float
    max_latency_s: float
    seconds: float
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class ToolBatch(Sequence[ToolText]):
    """Texts in the order of their prompts.

    Attributes:
      results: the texts.
    """

    results: tuple[ToolText, ...]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __iter__(self) -> Iterator[ToolText]:
        return iter(self.results)

    @property
    def summary(self) -> BatchSummary:
        """Calls, failures, latency and speed of all."""
        responses = [one for result in self.results for one in result.tool_responses]
        failed = [one.failure for one in responses if not one.ok]
        latencies = [one.seconds for one in responses]
        seconds, tokens = (sum(result.seconds for result in self.results),
                           sum(result.written for result in self.results))
        return BatchSummary(
            len(self.results), len(responses), len(failed),
            {kind: failed.count(kind) for kind in sorted(set(failed))},
            sum(latencies) / len(latencies) if latencies else math.nan,
            max(latencies, default=math.nan), seconds, tokens,
            tokens / max(seconds - sum(latencies), 1e-9))
