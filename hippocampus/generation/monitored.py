"""The calls of a `LanguageModel` that look at adapters: gates, memories, health."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hippocampus.probing.adapters.health import HealthReport
    from hippocampus.probing.adapters.monitors import GateReport, MemoryUsage


class Monitored:
    """What `LanguageModel` inherits for models with adapters; others refuse in one line."""

    def gate_statistics(
        self, texts: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    ) -> GateReport:
        """How far the gate of every adapter is open: mean, spread, percentiles, saturation.

        Args:
          texts: what is read: a text, several, or several of each category. None = 100 generated
            queries of five categories with their answers (`hippocampus.data.queries`).

        Returns:
          Per layer, and per category and layer.

        Raises:
          ConfigError: a model without adapters, or no texts.
          DataError: a text shorter than two tokens.
        """
        from hippocampus.probing.adapters.monitors import gate_statistics

        own: Any = self
        return gate_statistics(own, texts)

    def memory_usage(
        self, layer: int,
        texts: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    ) -> MemoryUsage:
        """How the slots of a layer are used: effective, dead and duplicate ones, and the hottest.

        Args:
          layer: of the decoder, one that has an adapter.
          texts: as for `gate_statistics`.

        Raises:
          ConfigError, DataError: as `gate_statistics`; or a layer without an adapter.
        """
        from hippocampus.probing.adapters.monitors import memory_usage

        own: Any = self
        return memory_usage(own, layer, texts)

    def health_report(self, base_text: str | None = None) -> HealthReport:
        """Whether the adapters are in order: five checks, and a score (`probing.adapters.health`).

        Args:
          base_text: general text that must not have become harder. None = 20,000 characters of
            the documentation that comes with Python.

        Raises:
          ConfigError, DataError: as `gate_statistics`.
        """
        from hippocampus.probing.adapters.health import health_report

        own: Any = self
        return health_report(own, base_text)
