"""How a server of the allow-list is reached, with a bound on what it can send."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hippocampus.serving.tool_config import ToolLimits, ToolServer
from hippocampus.serving.tool_server import built_in_server


@asynccontextmanager
async def connect(server: ToolServer, limits: ToolLimits) -> AsyncIterator[Any]:
    """An open client of mcp.

    Args:
      server: one of command, url, folder and server.
      limits: `message_bytes` bounds every message of a process or a url.
    """
    from mcp import Client

    if server.command:
        with open(os.devnull, "w") as nowhere:  # what it writes to stderr could forge a terminal
            async with Client(_process(server, limits, nowhere), cache=None) as client:
                yield client
    elif server.url:
        async with _web_client(limits) as web:
            from mcp.client.streamable_http import streamable_http_client

            transport = streamable_http_client(server.url, http_client=web,
                                               max_sse_event_size=limits.message_bytes)
            async with Client(transport, cache=None) as client:
                yield client
    else:
        inside = built_in_server(server.folder) if server.server is None else server.server
        async with Client(inside, cache=None) as client:
            yield client


def _process(server: ToolServer, limits: ToolLimits, errors: Any) -> Any:
    from mcp import StdioServerParameters
    from mcp.client.stdio import stdio_client

    guard = str(Path(__file__).with_name("stdio_guard.py"))
    return stdio_client(StdioServerParameters(
        command=sys.executable, cwd=server.cwd, env=dict(server.env),
        args=["-I", "-S", guard, str(limits.message_bytes), server.command, *server.args],
    ), errlog=errors)


def _web_client(limits: ToolLimits) -> Any:
    import httpx2

    class Bounded(httpx2.AsyncBaseTransport):
        """Answers that are not streams of events end with an error once they are too long."""

        def __init__(self) -> None:
            self._inner = httpx2.AsyncHTTPTransport()

        async def handle_async_request(self, request: Any) -> Any:
            response = await self._inner.handle_async_request(request)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.stream = _BoundedStream(response.stream, limits.message_bytes)
            return response

        async def aclose(self) -> None:
            await self._inner.aclose()

    class _BoundedStream(httpx2.AsyncByteStream):
        def __init__(self, inner: Any, limit: int) -> None:
            self._inner, self._left = inner, limit

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for block in self._inner:
                self._left -= len(block)
                if self._left < 0:
                    raise httpx2.ReadError("the answer is too long")
                yield block

        async def aclose(self) -> None:
            await self._inner.aclose()

    # Compressed answers could be small here and huge when they are read.
    return httpx2.AsyncClient(transport=Bounded(), follow_redirects=False, trust_env=False,
                              headers={"accept-encoding": "identity"},
                              timeout=httpx2.Timeout(limits.start_s, read=None))
