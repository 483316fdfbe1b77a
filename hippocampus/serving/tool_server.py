"""The built-in MCP server: `calculate`, `search`, `retrieve` and `verify`.

    python -m hippocampus.serving.tool_server --folder=notes          over standard input and output
    python -m hippocampus.serving.tool_server --folder=notes --http=8765      on 127.0.0.1 alone

All four only read. Without a folder there is `calculate` alone. `built_in_server` is the same in
the process that asks.
"""

# No postponed annotations here: the schemas of the tools are made from those of the functions.

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from hippocampus.errors import EXIT_OK, ConfigError, HippocampusError
from hippocampus.serving.calculator import LONGEST, calculate
from hippocampus.serving.documents import Documents

MOST_PASSAGES = 10
_LONGEST_QUERY = 2000


def built_in_server(folder: str | Path | None = None) -> Any:
    """The server, for `Client` of mcp or `ToolServer(server=…)`.

    Args:
      folder: of documents; None = the calculator alone.

    Returns:
      An `MCPServer`.

    Raises:
      ConfigError: the extra [tools] is not installed.
      DataError: the folder cannot be read.
    """
    require_mcp()
    from mcp.server.mcpserver import MCPServer
    from mcp.types import ToolAnnotations
    from pydantic import Field

    server = MCPServer("hippocampus", log_level="ERROR")

    def tool(function: Any) -> None:
        server.add_tool(function, structured_output=False, annotations=ToolAnnotations(
            read_only_hint=True, open_world_hint=False))

    def calculator(expression: Annotated[str, Field(max_length=LONGEST)]) -> str:
        return calculate(expression)

    _add(tool, "calculate", "Computes an arithmetic expression exactly, such as 3 * (4 + 0.5).",
         calculator)
    if folder is not None:
        _add_documents(tool, Documents.read(folder))
    return server


def require_mcp() -> None:
    """Refuses to go on where the extra is not installed.

    Raises:
      ConfigError: with the command that installs it.
    """
    try:
        import jsonschema  # noqa: F401
        import mcp  # noqa: F401
    except ImportError:
        raise ConfigError("tools need the package mcp, which is not installed",
                          "pip install '.[tools]'") from None


def _add_documents(tool: Any, documents: Documents) -> None:
    from pydantic import Field

    text = Field(max_length=_LONGEST_QUERY)

    def search(query: Annotated[str, text],
               limit: Annotated[int, Field(ge=1, le=MOST_PASSAGES)] = 3) -> str:
        return _json([asdict(passage) for passage in documents.search(query, limit)])

    def retrieve(document: Annotated[str, text], first: Annotated[int, Field(ge=0)] = 0,
                 count: Annotated[int, Field(ge=1, le=MOST_PASSAGES)] = 3) -> str:
        return documents.retrieve(document, first, count)

    def verify(claim: Annotated[str, text]) -> str:
        return _json(asdict(documents.verify(claim)))

    _add(tool, "search", "Finds the passages of the documents that fit a query best.", search)
    _add(tool, "retrieve", "Reads passages of a document that search has named.", retrieve)
    _add(tool, "verify", "Tells whether the documents say what a claim says.", verify)


def _add(tool: Any, name: str, description: str, function: Any) -> None:
    """Registers a function; what it refuses becomes the tool's answer, in one line."""
    from mcp.server.mcpserver.exceptions import ToolError

    @functools.wraps(function)
    def answering(**arguments: Any) -> str:
        try:
            found: str = function(**arguments)
        except HippocampusError as error:
            raise ToolError(str(error)) from None
        return found

    answering.__name__, answering.__doc__ = name, description
    tool(answering)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the server until its input ends.

    Args:
      arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m hippocampus.serving.tool_server",
                                     description="Serves four read-only tools over MCP.")
    parser.add_argument("--folder", type=Path, help="text files to search; none: calculate alone")
    parser.add_argument("--http", type=int, metavar="PORT",
                        help="serve http://127.0.0.1:PORT/mcp instead of standard input and output")
    flags = parser.parse_args(arguments)
    try:
        if flags.http is not None and not 0 < flags.http < 2**16:
            raise ConfigError(f"--http is {flags.http}", "it must be a port, 1 to 65535")
        server = built_in_server(flags.folder)
    except HippocampusError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    if flags.http is None:
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=flags.http, json_response=True,
                   stateless_http=True)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
