"""Tools of any MCP servers, as a model may use them: `Toolbox`.

Servers are started from an allow-list and never by a model. Every call is checked before it leaves
(name, size, schema) and after it comes back (time, size); whatever goes wrong is an answer with
`ok=False`, not an exception. All servers live on one private event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hippocampus.errors import ConfigError
from hippocampus.serving.tool_config import ToolLimits, ToolServer, read_servers
from hippocampus.serving.tool_server import require_mcp

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONGEST_DESCRIPTION = 1000
_LARGEST_SCHEMA = 20_000
_MOST_PAGES = 20
_MOST_REFERENCES = 1000
"""That the check of one call's arguments follows in a schema."""
_PATIENCE_S = 10.0
"""Seconds that servers have to end, before they are left behind."""


@dataclass(frozen=True)
class ToolSpec:
    """A tool that may be called.

    Attributes:
      name, description: as the server gives them, the description cut.
      schema: JSON schema of the arguments.
      server: whose it is.
    """

    name: str
    description: str
    schema: dict[str, Any]
    server: str


@dataclass(frozen=True)
class ToolResponse:
    """What came of a call.

    Attributes:
      name, arguments: of the call.
      ok: the tool has answered, and not with an error.
      output: what it said, or one line of what went wrong; cut to the limit.
      failure: "" or one of "not allowed", "arguments", "timeout", "server", "tool", "budget".
      seconds: that it took.
      cut: characters that were left out.
    """

    name: str
    arguments: dict[str, Any]
    ok: bool
    output: str
    failure: str = ""
    seconds: float = 0.0
    cut: int = 0


class _Link:
    """One server: its client while it lives, and why it does not."""

    def __init__(self, server: ToolServer):
        self.server, self.client, self.why = server, None, ""
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Toolbox:
    """The allowed tools of some servers, from `with Toolbox(…)` on until its end."""

    def __init__(self, servers: str | Path | Sequence[ToolServer] | ToolServer,
                 limits: ToolLimits | None = None):
        """Says what is allowed; nothing is started yet.

        Args:
          servers: a JSON file (see `tool_config`), or servers.
          limits: None = those of the file, or the usual ones.

        Raises:
          ConfigError, DataError: as `read_servers`; the extra [tools] is not installed.
        """
        require_mcp()
        if isinstance(servers, str | Path):
            servers, found = read_servers(servers)
            limits = limits or found
        elif isinstance(servers, ToolServer):
            servers = [servers]
        self.limits = limits or ToolLimits()
        self.specs: dict[str, ToolSpec] = {}
        self._servers = list(servers)
        self._links: dict[str, _Link] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Toolbox:
        """Starts the servers and asks for their tools.

        Raises:
          ConfigError: one does not start, lacks a tool that it is allowed, or two have one name.
        """
        if self._loop is not None:
            raise ConfigError("the toolbox is open already", "use one for each with statement")
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it logs what servers get wrong
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tools", daemon=True)
        self._thread.start()
        try:
            for server in self._servers:
                self._open(server)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Ends the servers."""
        self.close()

    def close(self) -> None:
        """Ends the servers; one that was started and does not end by itself is killed."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        # A tool in this process can hold the loop; its thread ends with the process then.
        with contextlib.suppress(concurrent.futures.TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(_end(list(self._links.values())), loop).result(
                _PATIENCE_S + 2)
        loop.call_soon_threadsafe(loop.stop)
        if self._thread is not None:
            self._thread.join(1.0)
            if not self._thread.is_alive():
                loop.close()
        self.specs = {}

    def call(self, name: str, arguments: Any) -> ToolResponse:
        """Calls a tool, if it may be called so.

        Args:
          name: of the tool.
          arguments: by name.

        Returns:
          Its answer, or what went wrong; nothing that a model or a server does raises.
        """
        start = time.perf_counter()
        ok, output, failure = self._answer(name, arguments)
        most = self.limits.output_characters
        cut = max(0, len(output) - most)
        return ToolResponse(str(name)[:64], arguments if isinstance(arguments, dict) else {}, ok,
                            output[:most] + " [cut]" * bool(cut), failure,
                            time.perf_counter() - start, cut)

    def check(self, name: str, arguments: Any) -> tuple[str, str]:
        """(kind of failure, one line) for a call that may not be made; empty for one that may."""
        spec = self.specs.get(name) if isinstance(name, str) else None
        if spec is None:
            return "not allowed", (f"there is no tool {str(name)[:40]!r}; there are "
                                   f"{', '.join(sorted(self.specs)) or 'none'}")
        if not isinstance(arguments, dict):
            return "arguments", f"the arguments of {name} are no object"
        try:
            # Half a surrogate pair, once in a pipe's writer, would end the connection for good.
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
            size = len(json.dumps(arguments))
        except (TypeError, ValueError, RecursionError):
            return "arguments", f"the arguments of {name} are no JSON"
        if size > self.limits.argument_characters:
            return "arguments", (f"the arguments of {name} have {size} characters, at most "
                                 f"{self.limits.argument_characters} are sent")
        problem = _schema_problem(arguments, spec.schema)
        return ("arguments", f"{name}: {problem}") if problem else ("", "")

    def _answer(self, name: str, arguments: Any) -> tuple[bool, str, str]:
        failure, line = self.check(name, arguments)
        if failure:
            return False, line, failure
        link, limit = self._links[self.specs[name].server], self.limits.timeout_s
        if self._loop is None or link.client is None:
            return False, f"the server of {name} is gone{link.why and ': '}{link.why}", "server"
        future = asyncio.run_coroutine_threadsafe(
            _ask(link.client, name, arguments, limit), self._loop)
        try:
            failed, text = future.result(limit + 1)
        except (TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
            return False, f"{name} has not answered within {limit:g} s", "timeout"
        except concurrent.futures.CancelledError:
            return False, f"the server of {name} is gone", "server"
        except Exception as error:  # a stranger's server can cause anything
            line = _line(error)
            if "timed out" in line.lower():
                return False, f"{name} has not answered within {limit:g} s", "timeout"
            if "closed" in line.lower():
                link.client, link.why = None, line
            return False, f"{name}: {line}", "server"
        return not failed, text, "tool" if failed else ""

    def _open(self, server: ToolServer) -> None:
        if server.name in self._links:
            raise ConfigError(f"two tool servers are called {server.name!r}", "rename one")
        assert self._loop is not None
        link = _Link(server)
        self._links[server.name] = link
        start = asyncio.run_coroutine_threadsafe(_begin(link, self.limits), self._loop)
        try:
            tools = start.result(self.limits.start_s + 2)
        except ConfigError:
            raise
        except BaseException as error:
            start.cancel()
            if not isinstance(error, Exception):
                raise
            raise ConfigError(f"the tool server {server.name!r} does not start: {_line(error)}",
                              "run its command by hand to see why") from None
        for spec in _allowed(server, tools):
            if spec.name in self.specs:
                raise ConfigError(f"{server.name!r} and {self.specs[spec.name].server!r} both have "
                                  f"a tool {spec.name}", "allow it for one of them")
            self.specs[spec.name] = spec


async def _begin(link: _Link, limits: ToolLimits) -> list[Any]:
    """Starts a server in a task of its own, which also ends it; gives its tools."""
    from hippocampus.serving.connections import connect

    started: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        try:
            async with connect(link.server, limits) as client:
                tools = await _list(client)
                link.client = client
                if not started.done():
                    started.set_result(tools)
                await link.stop.wait()
        except BaseException as error:
            link.why = link.why or _line(error)
            if not started.done():
                started.set_exception(RuntimeError(_line(error)))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        finally:
            link.client = None

    link.task = asyncio.create_task(hold())
    try:
        async with asyncio.timeout(limits.start_s):
            return await asyncio.shield(started)
    except TimeoutError:
        started.cancel()
        link.task.cancel()
        raise TimeoutError(f"no answer within {limits.start_s:g} s") from None


async def _list(client: Any) -> list[Any]:
    found: list[Any] = []
    cursor = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
    return found


async def _ask(client: Any, name: str, arguments: dict[str, Any],
               limit: float) -> tuple[bool, str]:
    async with asyncio.timeout(limit):
        result = await client.call_tool(name, arguments, read_timeout_seconds=limit)
    parts = [part.text if part.type == "text" else f"[{part.type}]" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return bool(result.is_error), "\n".join(parts)


async def _end(links: list[_Link]) -> None:
    tasks = [link.task for link in links if link.task is not None]
    for link in links:
        link.stop.set()
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=_PATIENCE_S - 1)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1)


def _allowed(server: ToolServer, tools: Sequence[Any]) -> list[ToolSpec]:
    """The tools of a server that may be called."""
    found = {tool.name: tool for tool in tools if _NAME.fullmatch(tool.name)}
    wanted = list(found) if "*" in server.tools else list(server.tools)
    specs = []
    for name in wanted:
        if name not in found:
            raise ConfigError(f"the tool server {server.name!r} has no tool {name!r}",
                              f"it has {', '.join(sorted(found)) or 'none'}")
        schema = dict(found[name].input_schema)
        if len(json.dumps(schema)) > _LARGEST_SCHEMA:
            raise ConfigError(f"the schema of {name} has more than {_LARGEST_SCHEMA} characters",
                              "do not allow this tool")
        specs.append(ToolSpec(name, (found[name].description or "")[:_LONGEST_DESCRIPTION].strip(),
                              schema, server.name))
    return specs


def _schema_problem(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What is wrong with arguments, in a line; empty if nothing is.

    A schema comes from a server: it may neither fetch others nor bring a regular expression, which
    could keep us busy for ever.
    """
    import jsonschema
    import referencing

    plain, followed = jsonschema.Draft202012Validator, itertools.count(1)

    def counted(keyword: str) -> Any:
        follow = plain.VALIDATORS[keyword]

        def check(*arguments: Any) -> Any:
            if next(followed) > _MOST_REFERENCES:  # each may hold two of the next, and so on
                raise RecursionError
            return follow(*arguments)

        return check

    kind = jsonschema.validators.extend(plain, {
        "pattern": None, "patternProperties": None,
        **{keyword: counted(keyword) for keyword in ("$ref", "$dynamicRef")}})
    try:
        properties = schema.get("properties", {})
        unknown = [name for name in arguments if name not in properties]
        if unknown and schema.get("additionalProperties", False) is False:
            return f"there is no argument {unknown[0][:40]!r}"
        error = next(kind(schema, registry=referencing.Registry()).iter_errors(arguments), None)
    except Exception as problem:  # a schema that is none, refers elsewhere, or to itself
        return f"its schema cannot be checked: {type(problem).__name__}"
    return error.message.splitlines()[0][:200] if error is not None else ""


def _line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]
