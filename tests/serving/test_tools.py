"""Any server can be used, and none can do harm: real processes, over pipes and the loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hippocampus.errors import ConfigError, DataError
from hippocampus.serving.tool_config import ToolLimits, ToolServer, read_servers
from hippocampus.serving.tools import Toolbox, _schema_problem

pytest.importorskip("mcp", reason="the extra [tools] is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK = ToolLimits(timeout_s=2.0, output_characters=500, argument_characters=200,
                   message_bytes=2**20)


def hostile(*tools):
    return ToolServer("hostile", tools or ["*"], command=sys.executable,
                      args=[str(HERE / "hostile_server.py")])


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def children():
    """Of this process, those that nobody has waited for included."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{os.getpid()}\n" in path.read_text():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    (root / "lorn.txt").write_text("The harbour of Lorn was built in 1823.")
    return root


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(port, *command):
    """A server that answers on the loopback."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the server does not answer")


# ---------------------------------------------------------------- the four tools

def use_all_four(tools):
    assert list(tools.specs) == ["calculate", "search", "retrieve", "verify"]
    assert tools.call("calculate", {"expression": "1/3 + 1/6"}).output == "0.5"
    assert "1823" in tools.call("search", {"query": "harbour"}).output
    assert "1823" in tools.call("retrieve", {"document": "lorn.txt"}).output
    verdict = tools.call("verify", {"claim": "The harbour of Lorn was built in 1824."})
    assert verdict.ok and json.loads(verdict.output)["verdict"] == "conflicting"
    for expression in ("9**9**9", "__import__('os')", "(" * 150 + ")" * 150, "1/0"):
        found = tools.call("calculate", {"expression": expression})
        assert (found.ok, found.failure) == (False, "tool") and "\n" not in found.output
    for name in ("../lorn.txt", "/etc/passwd"):
        found = tools.call("retrieve", {"document": name})
        assert not found.ok and "no document" in found.output


def test_the_four_tools_answer_in_this_process(folder):
    with Toolbox(ToolServer("own", ["*"], folder=folder)) as tools:
        use_all_four(tools)


def test_the_four_tools_answer_over_pipes_and_leave_no_process(folder):
    before = children()
    server = ToolServer("own", ["*"], command=sys.executable, env={"PYTHONPATH": str(ROOT)},
                        args=["-m", "hippocampus.serving.tool_server", f"--folder={folder}"])
    with Toolbox(server) as tools:
        use_all_four(tools)
        assert children() > before
    assert children() == before


def test_the_four_tools_answer_over_http_until_the_server_is_killed(folder, port):
    process = serve(port, "-m", "hippocampus.serving.tool_server", f"--folder={folder}",
                    f"--http={port}")
    try:
        with Toolbox(ToolServer("web", ["*"], url=f"http://127.0.0.1:{port}/mcp")) as tools:
            use_all_four(tools)
            process.kill()
            process.wait()
            found = tools.call("calculate", {"expression": "1"})
            assert (found.ok, found.failure) == (False, "server")
    finally:
        process.kill()
        process.wait()


def test_only_the_loopback_is_served(folder, port):
    process = serve(port, "-m", "hippocampus.serving.tool_server", f"--http={port}")
    try:
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        addresses = {line.split()[1].split(":")[0] for line in listening.splitlines()
                     if f":{port:04X} " in line and line.split()[3] == "0A"}
        assert addresses == {"0100007F"}
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- hostile servers

@pytest.fixture(scope="module")
def tools():
    with Toolbox(hostile(), QUICK) as tools:
        yield tools


def test_a_tool_that_never_answers_is_left_and_the_next_call_works(tools):
    start = time.perf_counter()
    found = tools.call("endless", {})
    assert (found.ok, found.failure) == (False, "timeout")
    assert 1.9 < time.perf_counter() - start < 10
    assert tools.call("process", {}).ok


def test_a_long_answer_is_cut_and_says_so(tools):
    found = tools.call("huge", {})
    assert found.ok and len(found.output) < 520 and found.output.endswith("[cut]")
    assert found.cut == 300_000 - 500


@pytest.mark.parametrize(("name", "arguments", "failure"), [
    ("rm", {}, "not allowed"), ("", {}, "not allowed"), (None, {}, "not allowed"),
    (["huge"], {}, "not allowed"), ("huge\n", {}, "not allowed"),
    ("huge", {"x": 1}, "arguments"), ("huge", [], "arguments"), ("huge", None, "arguments"),
    ("huge", {"x": "y" * 999}, "arguments"), ("huge", {"x": object()}, "arguments"),
    ("huge", {"x": {1, 2}}, "arguments")])
def test_a_call_that_may_not_be_made_is_not_made(tools, name, arguments, failure):
    found = tools.call(name, arguments)
    assert (found.ok, found.failure) == (False, failure)
    assert found.output and "\n" not in found.output and len(found.output) < 300


@pytest.mark.parametrize("arguments", [
    {"text": "a\ud800"}, {"text": "", "\udfff": 1}, {"text": "", "number": float("nan")},
    {"text": "", "number": float("-inf")}])
def test_what_json_cannot_carry_is_not_sent_and_the_server_stays(tools, arguments):
    found = tools.call("take", arguments)
    assert (found.ok, found.failure) == (False, "arguments") and "\n" not in found.output
    found = tools.call("take", {"text": "\U0001f600", "number": 2.5})
    assert (found.ok, found.output) == (True, "1 2.5")


def test_arguments_of_many_characters_are_not_sent(folder):
    with Toolbox(ToolServer("own", ["calculate"], folder=folder), QUICK) as tools:
        assert tools.call("calculate", {"expression": "1" + "+1" * 80}).output == "81"
        found = tools.call("calculate", {"expression": "1" + "+1" * 100})
        assert found.failure == "arguments" and "at most 200 are sent" in found.output


@pytest.mark.parametrize("way", ["die", "flood"])
def test_a_server_that_dies_or_floods_is_reported_and_leaves_nothing(way):
    before = children()
    with Toolbox([hostile(), ToolServer("own", ["calculate"], folder=HERE.parents[1] / "docs")],
                 ToolLimits(timeout_s=10, message_bytes=2**20)) as tools:
        pid = int(tools.call("process", {}).output)
        assert alive(pid)
        start = time.perf_counter()
        found = tools.call(way, {})
        assert (found.ok, found.failure) == (False, "server")
        assert time.perf_counter() - start < 8, "the end is noticed, not waited for"
        assert tools.call("process", {}).failure == "server"
        assert tools.call("calculate", {"expression": "6*7"}).output == "42", "others go on"
    assert not alive(pid) and children() == before


def test_a_server_killed_in_the_middle_of_a_call_is_reported():
    import threading

    with Toolbox(hostile(), ToolLimits(timeout_s=20)) as tools:
        pid = int(tools.call("process", {}).output)
        threading.Timer(0.3, os.kill, (pid, 9)).start()
        start = time.perf_counter()
        found = tools.call("endless", {})
        assert (found.ok, found.failure) == (False, "server")
        assert time.perf_counter() - start < 10
    assert not alive(pid)


def test_a_tool_that_is_not_on_the_list_is_not_there():
    with Toolbox(hostile("huge"), QUICK) as tools:
        assert list(tools.specs) == ["huge"]
        assert tools.call("die", {}).failure == "not allowed"
        assert tools.call("huge", {}).ok
    assert tools.call("huge", {}).failure == "not allowed", "closed"


def test_an_answer_over_http_that_is_too_long_is_not_read(port):
    process = serve(port, str(HERE / "hostile_server.py"), str(port))
    try:
        server = ToolServer("web", ["huge", "process"], url=f"http://127.0.0.1:{port}/mcp")
        with Toolbox(server, ToolLimits(timeout_s=5, message_bytes=50_000)) as tools:
            assert tools.call("process", {}).ok
            assert tools.call("huge", {}).failure in ("server", "timeout")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("schema", [
    {"$ref": "http://127.0.0.1:9/schema"}, {"$ref": "#"}, {"$ref": "file:///etc/passwd"},
    {"type": 3}, {"properties": {"a": {"$ref": "#/properties/a"}}}, {"properties": None},
    {"properties": 3, "additionalProperties": False}])
def test_a_hostile_schema_fetches_nothing_and_ends(schema):
    start = time.perf_counter()
    assert "\n" not in _schema_problem({"a": "a" * 40 + "!"},
                                       {"additionalProperties": True, **schema})
    assert time.perf_counter() - start < 2


def test_a_schema_whose_references_double_at_every_level_ends():
    levels = {f"l{n}": {"allOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(40)}
    schema = {"properties": {"a": {"$ref": "#/$defs/l0"}},
              "$defs": {**levels, "l40": {"type": "string"}}}
    start = time.monotonic()
    assert "cannot be checked" in _schema_problem({"a": "x"}, schema)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("more", "problem"), [
    ({}, "no argument"), ({"additionalProperties": False}, "no argument"),
    ({"additionalProperties": True}, ""), ({"additionalProperties": {}}, ""),
    ({"additionalProperties": {"type": "string"}}, "is not of type")])
def test_arguments_that_a_schema_does_not_name_are_refused_unless_it_lets_them_in(more, problem):
    found = _schema_problem({"a": "x", "b": 3}, {"properties": {"a": {"type": "string"}}, **more})
    assert (problem in found) if problem else found == ""


def test_a_pattern_of_a_schema_is_not_run():
    schema = {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    start = time.perf_counter()
    assert _schema_problem({"a": "a" * 60 + "!"}, schema) == ""
    assert "is not of type" in _schema_problem({"a": 3}, schema)
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------- what is allowed

def test_a_file_says_what_is_allowed(tmp_path, folder):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"servers": {"own": {"folder": str(folder), "tools": ["verify"]}},
                                "limits": {"calls": 3}}))
    (server,), limits = read_servers(path)
    assert (server.name, limits.calls) == ("own", 3)
    with Toolbox(path) as tools:
        assert list(tools.specs) == ["verify"] and tools.limits.calls == 3


@pytest.mark.parametrize(("content", "message"), [
    ("{", "no JSON"), ("[" * 99_999, "no JSON"), ("[]", "other fields"), ("{}", "names no servers"),
    ('{"servers": {"a": {"folder": "."}}}', "which tools"),
    ('{"servers": {"a": {"folder": ".", "tools": []}}}', "any tool"),
    ('{"servers": {"a": {"folder": ".", "tools": "*"}}}', "tools of"),
    ('{"servers": {"a": {"folder": ".", "url": "http://a", "tools": ["*"]}}}', "has 2 of"),
    ('{"servers": {"a": {"tools": ["*"]}}}', "has 0 of"),
    ('{"servers": {"a": {"url": "file:///etc", "tools": ["*"]}}}', "url of"),
    ('{"servers": {"a": {"server": 1, "tools": ["*"]}}}', "unknown field"),
    ('{"servers": {"a": {"comand": "x", "tools": ["*"]}}}', "unknown field"),
    ('{"servers": {"a": {"folder": ".", "tools": ["*"]}}, "limits": {"calls": -1}}', "calls is"),
    ('{"servers": {"a": {"folder": ".", "tools": ["*"]}}, "limits": {"timeout_s": NaN}}', "is nan"),
])
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_servers(tmp_path / "tools.json")
    assert caught.value.hint and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_servers(tmp_path / "none.json")


def test_a_server_that_does_not_start_or_lacks_a_tool_is_refused_and_nothing_stays(folder):
    before = children()
    for servers, message in (
            (ToolServer("a", ["*"], command="/nowhere/to/be/found"), "does not start"),
            (ToolServer("a", ["*"], url="http://127.0.0.1:9/mcp"), "does not start"),
            (ToolServer("a", ["rm"], folder=folder), "has no tool 'rm'"),
            ([ToolServer(n, ["calculate"], folder=folder) for n in "ab"], "both have a tool"),
            ([ToolServer("a", ["search"], folder=folder)] * 2, "are called 'a'")):
        with pytest.raises(ConfigError, match=message) as caught, Toolbox(servers, QUICK):
            pass
        assert "\n" not in str(caught.value)
    assert children() == before


def test_without_the_package_a_toolbox_is_refused_with_the_command_that_installs_it():
    code = ("import sys; sys.modules['mcp'] = None\n"
            "import hippocampus, hippocampus.serving.tools as t\n"
            "from hippocampus.errors import ConfigError\n"
            "try: t.Toolbox([])\nexcept ConfigError as e: print(e)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.stdout == ("tools need the package mcp, which is not installed (pip install "
                            "'.[tools]')\n"), found.stderr
