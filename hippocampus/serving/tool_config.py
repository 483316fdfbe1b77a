"""Which servers may be asked, for which tools, and within what limits: `ToolServer`, `ToolLimits`.

A JSON file says the same; what is not in it is not started, not reached and not called.

    {"servers": {"notes": {"folder": "notes", "tools": ["search", "retrieve"]},
                 "git": {"command": "uvx", "args": ["mcp-server-git"], "tools": ["git_log"]},
                 "web": {"url": "http://127.0.0.1:8765/mcp", "tools": ["fetch"]}},
     "limits": {"calls": 8, "timeout_s": 20}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hippocampus.errors import ConfigError, DataError

_LARGEST_FILE = 2**20


@dataclass(frozen=True)
class ToolLimits:
    """What a model may do with its tools at most.

    Attributes:
      calls: of one text.
      timeout_s: seconds of one call.
      start_s: seconds until a server has started and named its tools.
      output_characters: of a result that the model sees.
      argument_characters: of a call, as JSON.
      message_bytes: of what a server sends at once; more ends the connection.
    """

    calls: int = 8
    timeout_s: float = 20.0
    start_s: float = 30.0
    output_characters: int = 4000
    argument_characters: int = 4000
    message_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            whole = not name.endswith("_s")
            kind = int if whole else (int, float)
            low = 0 if name == "calls" else 1 if whole else 0.001
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < 2**40:
                raise ConfigError(f"limits.{name} is {value!r}", f"it must be a "
                                  f"{'whole ' if whole else ''}number, at least {low}")


@dataclass(frozen=True)
class ToolServer:
    """One server; exactly one of command, url, folder and server.

    Attributes:
      name: for messages.
      tools: names of the tools that may be called; ("*",) = all that it has.
      command, args, env, cwd: a process that is started, and speaks over its standard input and
        output. Of the environment it gets HOME, LOGNAME, PATH, SHELL, TERM, USER and `env`.
      url: of a server that runs already.
      folder: the built-in server over these documents, in this process.
      server: an `MCPServer`, in this process; only code that you trust, as it cannot be stopped.
    """

    name: str
    tools: Sequence[str]
    command: str = ""
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | Path | None = None
    url: str = ""
    folder: str | Path | None = None
    server: Any = None

    def __post_init__(self) -> None:
        where = f"the tool server {self.name!r}"
        ways = [bool(self.command), bool(self.url), self.folder is not None,
                self.server is not None]
        if sum(ways) != 1:
            raise ConfigError(f"{where} has {sum(ways)} of command, url, folder and server",
                              "give exactly one")
        texts = (self.name, self.command, self.url, *self.env, *self.env.values())
        if not all(isinstance(text, str) for text in texts) or not self.name:
            raise ConfigError(f"{where} has a field that is no text", "give text")
        for name, value in (("tools", self.tools), ("args", self.args)):
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if not listed or not all(isinstance(one, str) for one in value):
                raise ConfigError(f"{name} of {where} is {value!r}", "it must be a list of names")
        if not self.tools:
            raise ConfigError(f"{where} may not be asked for any tool",
                              'name those that it may in tools, or "*" for all')
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url of {where} is {self.url!r}", "it must begin with http:// or "
                              "https://")


def read_servers(path: str | Path) -> tuple[list[ToolServer], ToolLimits]:
    """Reads the JSON file that says what is allowed.

    Args:
      path: the file.

    Raises:
      DataError: it cannot be read.
      ConfigError: it is no JSON, or has a field that is not known or not right.
    """
    try:
        content = Path(path).read_bytes()[:_LARGEST_FILE]
    except OSError as error:
        raise DataError(f"the tool servers {path} cannot be read: {error.strerror}",
                        "give a JSON file; docs/tools.md shows one") from None
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {str(error).splitlines()[0]}",
                          "docs/tools.md shows one") from None
    if not isinstance(found, dict) or set(found) - {"servers", "limits"}:
        raise ConfigError(f"{path} has other fields than servers and limits",
                          "docs/tools.md shows one")
    servers = found.get("servers")
    if not isinstance(servers, dict) or not servers:
        raise ConfigError(f"{path} names no servers", "docs/tools.md shows some")
    return ([_make(ToolServer, {**_fields(one, path), "name": name}, path, {"server", "name"})
             for name, one in servers.items()],
            _make(ToolLimits, _fields(found.get("limits", {}), path), path, set()))


def _fields(value: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} has {str(value)[:40]!r} in place of fields", "give an object")
    return value


def _make(kind: Any, fields: dict[str, Any], path: str | Path, hidden: set[str]) -> Any:
    known = {one.name for one in dataclasses.fields(kind)}
    for name in fields:
        if name not in known or (name in hidden and name != "name"):
            raise ConfigError(f"{path} has the unknown field {name!r}",
                              f"known are {', '.join(sorted(known - hidden))}")
    if kind is ToolServer and "tools" not in fields:
        raise ConfigError(f"{path} does not say which tools of {fields['name']!r} may be called",
                          'name them in tools, or "*" for all')
    return kind(**fields)
