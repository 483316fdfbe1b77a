"""Several processes that train one model: how they find each other, agree, and end together.

JAX itself is the engine (`jax.distributed`); a TPU pod, SLURM, GKE or a shell starts the
processes. Here is what a program has to add: when to start it, what every process must have in
common, and that an error on one process ends all of them, with its exit code and one line.

Agreement goes through the key-value store of JAX's coordination service, not through collectives
of the devices: it works while another process is still busy for minutes, and before and after
there is anything on a device. Without several processes every function here is a plain no-op.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hippocampus.errors import ConfigError, HippocampusError

HEARTBEAT = "HIPPOCAMPUS_HEARTBEAT_SECONDS"
"""Environment variable: after so long without a sign of life a process counts as dead."""
DEFAULT_HEARTBEAT_SECONDS = 30

_DAY_MS = 24 * 3600 * 1000
_FAILED = "hippocampus/failed"
_SECONDS_TO_SAY_GOODBYE = 5.0
_SECONDS_TO_GO = 0.5
_rounds = itertools.count()
_agreements = itertools.count()
_has_failed = False
_is_joining = False
_leaving = threading.Lock()
_shutdown = threading.Lock()
_watcher: _Watcher | None = None


@dataclass(frozen=True)
class Launch:
    """Who takes part; None where the cluster's own environment says it."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of a verb that can run on several processes."""
    group = parser.add_argument_group(
        "several processes", "detected on TPU pods, SLURM and Open MPI; elsewhere give all three "
        "to every process, here or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int, help="0 to num_processes - 1")
    group.add_argument("--expect_devices", type=int, default=0, metavar="N",
                       help="stop unless there are N devices over all processes (mesh.devices)")


def initialize(coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None) -> bool:
    """Joins the other processes, if there are any; before JAX looks at a device.

    What is given counts first, then the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), then what a cluster says of itself: a SLURM or Open MPI step of several tasks,
    a TPU pod slice, or several slices. Without any of it there is one process and nothing is done.

    Returns:
      Whether there are several processes.

    Raises:
      ConfigError: some of the three are given, but not all, or they do not fit together.
      HippocampusError: the others could not be reached in time; worth another try.
    """
    global _watcher, _is_joining
    launch = find_launch(coordinator_address, num_processes, process_id)
    if launch is None:
        return False
    import jax

    # It would take SIGTERM from hippocampus.training.signals, and looks only between steps.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = launch.num_processes is not None
    _is_joining = True
    try:
        jax.distributed.initialize(
            launch.coordinator_address, launch.num_processes, launch.process_id,
            # A stray cluster variable must not take part in what was given in full.
            cluster_detection_method="deactivate" if explicit else None,
            coordinator_bind_address=_bind_address(launch.coordinator_address),
            heartbeat_timeout_seconds=_heartbeat_seconds(),
            shutdown_timeout_seconds=2 * DEFAULT_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HippocampusError(
            f"cannot join the other processes: {first_line[:300]}",
            "is every process started, and the coordinator's port reachable and free?") from error
    finally:
        _is_joining = False
    if is_several():
        _watcher = _Watcher()
    return is_several()


def find_launch(coordinator_address: str | None = None, num_processes: int | None = None,
                process_id: int | None = None) -> Launch | None:
    """Who takes part; None = this process alone.

    Raises:
      ConfigError: see `initialize`.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES", num_processes)
    own = _number("JAX_PROCESS_ID", process_id)
    if count is None and own is None:
        # A cluster may still be told where its coordinator is.
        if _cluster_of_several():
            return Launch(address, None, None)
        if address is None:
            return None
    if address is None or count is None or own is None:
        missing = [name for name, value in (("--coordinator_address", address),
                                            ("--num_processes", count), ("--process_id", own))
                   if value is None]
        raise ConfigError(f"{missing[0]} is missing: several processes need all of "
                          "--coordinator_address, --num_processes and --process_id",
                          "give them to every process, or none of them on a cluster")
    if not 0 <= own < count:
        raise ConfigError(f"--process_id is {own} of --num_processes={count}",
                          "it must be 0 to num_processes - 1, each once")
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise ConfigError(f"--coordinator_address is {address!r}", "it must be HOST:PORT")
    return Launch(address, count, own) if count > 1 else None


def is_several() -> bool:
    """Whether this process is one of several; not while it still waits for them to join."""
    return not _is_joining and _client() is not None and _state().num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints; True where there is only one."""
    return _state().process_id == 0 if is_several() else True


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all have to call it."""
    if not is_several():
        return [text]
    client, state, name = _client(), _state(), _round()
    client.key_value_set(f"{name}/{state.process_id}", text)
    return [client.blocking_key_value_get(f"{name}/{i}", _DAY_MS)
            for i in range(state.num_processes)]


def from_first(value: Any) -> Any:
    """What process 0 has (anything that JSON can hold); all have to call it."""
    return json.loads(gather(json.dumps(value))[0])


def barrier() -> None:
    """Returns when every process is here."""
    if is_several():
        _client().wait_at_barrier(_round(), _DAY_MS)


def check_same(record: Mapping[str, Any]) -> None:
    """Refuses processes that were not started alike; all have to call it.

    Args:
      record: name -> value (of JSON) that has to be the same everywhere.

    Raises:
      ConfigError: the first name that differs, with both values.
    """
    first, *others = (json.loads(text) for text in gather(json.dumps(record)))
    for i, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"process {i} has {name} = {_short(other.get(name))}, process 0 has "
                    f"{_short(first.get(name))}",
                    "start every process with the same command, versions and data")


class Agreement:
    """What processes tell each other to stop together; all of them make the same ones in order."""

    def __init__(self) -> None:
        self._name = f"hippocampus/stop/{next(_agreements)}"

    def ask(self, number: int) -> None:
        """Tells all processes, this one included, that a signal asks for an end."""
        if is_several():
            with contextlib.suppress(Exception):  # another process was asked before this one
                _client().key_value_set(self._name, str(number))

    def asked(self) -> int | None:
        """The number of the signal that some process was asked to stop by."""
        with _shutdown, contextlib.suppress(Exception):  # nobody was
            return int(_client().key_value_try_get(self._name)) if is_several() else None
        return None

    def answer(self, answer: Any) -> None:
        """Says what the others have to know, as JSON can hold it; only the first answer counts."""
        if is_several():
            with contextlib.suppress(Exception):  # it has answered already
                _client().key_value_set(f"{self._name}/{_state().process_id}", json.dumps(answer))

    def answers(self) -> list[Any] | None:
        """What every process has answered, in order; None if the connection ends before that."""
        client, state = _client(), _state()
        try:
            return [json.loads(client.blocking_key_value_get(f"{self._name}/{i}", _DAY_MS))
                    for i in range(state.num_processes)]
        except Exception:
            return None


def report_failure(code: int) -> bool:
    """Tells the other processes to end with this exit code.

    Returns:
      Whether this process is the one to say why: the first that failed, and its first failure.
    """
    global _has_failed
    if not is_several():
        return True
    if _has_failed:  # of the same cause: the others are leaving
        return False
    _has_failed = True
    client, own = _client(), _state().process_id
    with contextlib.suppress(Exception):  # somebody was first, or the coordinator is gone
        client.key_value_set(_FAILED, json.dumps({"code": code, "by": own}))
    try:
        return json.loads(client.key_value_try_get(_FAILED))["by"] == own
    except Exception:
        return True


def leave_failed(code: int) -> None:
    """Ends this process after `report_failure`, without waiting for collectives of the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not is_several():
        return
    _leaving.acquire()  # never released: who comes second waits for the end
    with contextlib.suppress(Exception):
        failed = json.loads(_client().blocking_key_value_get(_FAILED, 1000))
        if failed["by"] != _state().process_id:
            time.sleep(_SECONDS_TO_SAY_GOODBYE)  # the watcher ends this process
    _depart(code)


def _depart(code: int) -> NoReturn:
    """Ends this process; the coordinator goes last, because JAX aborts those that miss it."""
    client, state = _client(), _state()
    give_up = time.monotonic() + _SECONDS_TO_SAY_GOODBYE
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_FAILED}/seen/{state.process_id}", "")
        if state.process_id == 0:
            for i in range(1, state.num_processes):
                left = max(1, round(1000 * (give_up - time.monotonic())))
                client.blocking_key_value_get(f"{_FAILED}/seen/{i}", left)
            time.sleep(_SECONDS_TO_GO)  # they have seen it, and may not be gone yet
    os._exit(code)


def finish() -> None:
    """Ends the connection when all processes are done."""
    global _watcher
    if is_several():
        import jax

        barrier()
        if _watcher is not None:
            _watcher.stop()
            _watcher = None
        with _shutdown:  # not while another thread asks
            jax.distributed.shutdown()


class _Watcher:
    """Ends this process when another one has failed, even from inside a collective."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        client, own = _client(), _state().process_id
        while not self._stopped.wait(0.3):
            try:
                failed = json.loads(client.key_value_try_get(_FAILED))
            except Exception:  # nobody has failed; a lost coordinator is JAX's to notice
                continue
            if failed["by"] == own:
                return
            sys.stdout.flush()
            _depart(failed["code"])


def _state() -> Any:
    # JAX has no public name for its key-value store; Orbax reads it from here too.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    # Where JAX is not even imported there is no other process. Importing it is not for this
    # function to do: a thread may ask while the main one is in the middle of that.
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    return None if state is None else state.client


def _round() -> str:
    """A name that is the same on all processes, because all make the same calls in order."""
    return f"hippocampus/{next(_rounds)}"


def _number(variable: str, given: int | None) -> int | None:
    if given is not None or not os.environ.get(variable):
        return given
    text = os.environ[variable]
    if not text.isdecimal():
        raise ConfigError(f"{variable} is {text!r}", "it must be a number")
    return int(text)


def _heartbeat_seconds() -> int:
    seconds = _number(HEARTBEAT, None)
    return DEFAULT_HEARTBEAT_SECONDS if seconds is None else max(1, seconds)


def _bind_address(address: str | None) -> str | None:
    """The coordinator has no password: on one machine nobody else need reach it."""
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return os.environ["JAX_COORDINATOR_BIND_ADDRESS"]
    host = (address or "").rpartition(":")[0]
    return address if host in ("localhost", "[::1]") or host.startswith("127.") else None


def _cluster_of_several() -> bool:
    """Whether something that JAX can detect has started more than this process."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
             "SLURM_LOCALID")
    if all(name in env for name in slurm):
        return _is_above_one(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
    if "OMPI_MCA_orte_hnp_uri" in env:
        return _is_above_one(env.get("OMPI_COMM_WORLD_SIZE"))
    if _is_above_one(env.get("MEGASCALE_NUM_SLICES")) or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return _is_tpu_vm() and "," in _tpu_metadata("worker-network-endpoints")


def _is_above_one(count: str | None) -> bool:
    return count is not None and count.isdecimal() and int(count) > 1


def _is_tpu_vm() -> bool:
    """A machine with TPU chips; a notebook of Colab or Kaggle has them too, and is always alone."""
    notebook = any(name.startswith(("COLAB_", "KAGGLE_")) for name in os.environ)
    return not notebook and any(Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))


def _tpu_metadata(key: str) -> str:
    """An attribute of this TPU VM, "" without a metadata server."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"})
    try:
        # The metadata server is on the link itself: never behind a proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=3) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
