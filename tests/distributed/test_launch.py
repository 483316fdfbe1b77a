"""When a program joins others, and what it asks of its environment to know."""

import contextlib
import http.server
import threading

import pytest

from hippocampus import distributed
from hippocampus.distributed import Launch, find_launch
from hippocampus.errors import ConfigError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", "TPU_",
                            "MEGASCALE_", "COLAB_", "KAGGLE_", "HIPPOCAMPUS_HEART")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "_is_tpu_vm", lambda: False)


def test_a_plain_machine_is_alone():
    assert find_launch() is None
    assert not distributed.initialize() and not distributed.is_several()


def test_alone_every_agreement_is_its_own():
    assert distributed.is_first()
    assert distributed.gather("a") == ["a"]
    assert distributed.from_first({"a": [1, None]}) == {"a": [1, None]}
    distributed.barrier()
    distributed.check_same({"a": 1})
    assert distributed.report_failure(64)
    distributed.leave_failed(64)  # returns
    distributed.finish()


def test_flags_count_before_the_environment(monkeypatch):
    for name, value in (("JAX_COORDINATOR_ADDRESS", "b:1"), ("JAX_NUM_PROCESSES", "4"),
                        ("JAX_PROCESS_ID", "2")):
        monkeypatch.setenv(name, value)
    assert find_launch() == Launch("b:1", 4, 2)
    assert find_launch("a:9", 3, 0) == Launch("a:9", 3, 0)
    assert find_launch(process_id=3) == Launch("b:1", 4, 3)


def test_what_is_given_counts_before_the_cluster(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_launch("a:9", 3, 1) == Launch("a:9", 3, 1)


def test_one_process_needs_no_others():
    assert find_launch("a:9", 1, 0) is None


@pytest.mark.parametrize(("given", "words"), [
    (("a:9", None, None), "--num_processes is missing"), ((None, 2, 0), "--coordinator_address is"),
    (("a:9", 2, None), "--process_id is missing"), (("a:9", 2, 2), "--process_id is 2"),
    (("a:9", 2, -1), "--process_id is -1"), (("a", 2, 1), "--coordinator_address is 'a'"),
    ((":9", 2, 1), "--coordinator_address is ':9'"), (("a:x", 2, 1), "--coordinator_address is"),
])
def test_what_does_not_fit_together_is_refused(given, words):
    with pytest.raises(ConfigError) as caught:
        find_launch(*given)
    assert caught.value.message.startswith(words) and caught.value.hint


def test_a_variable_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES is 'two'"):
        find_launch("a:9", None, 0)


@pytest.mark.parametrize(("changes", "several"), [
    ({}, True), ({"SLURM_NTASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # a shell inside a larger allocation
    ({"SLURM_STEP_NODELIST": None}, False),  # the batch script itself, outside srun
])
def test_slurm_counts_as_a_cluster_in_a_step_of_several_tasks(monkeypatch, changes, several):
    for name, value in {**SLURM, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert find_launch() == (Launch(None, None, None) if several else None)


@pytest.mark.parametrize(("env", "several"), [
    ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True), ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"MEGASCALE_NUM_SLICES": "2"}, True), ({"MEGASCALE_NUM_SLICES": "1"}, False),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://x:1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://x:1", "OMPI_COMM_WORLD_SIZE": "1"}, False)])
def test_pods_slices_and_open_mpi_count_as_a_cluster(monkeypatch, env, several):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert (find_launch() is not None) == several


@contextlib.contextmanager
def metadata_server(workers: str):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            good = (self.path.endswith("/attributes/worker-network-endpoints")
                    and self.headers["Metadata-Flavor"] == "Google")
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write(workers.encode() if good else b"")

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("workers", "several"), [
    ("unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2", True),
    ("unknown:unknown:10.0.0.1", False)])
def test_a_tpu_vm_asks_its_metadata_how_many_workers_there_are(monkeypatch, workers, several):
    monkeypatch.setattr(distributed, "_is_tpu_vm", lambda: True)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    with metadata_server(workers) as address:
        monkeypatch.setenv("GCE_METADATA_IP", address)
        assert (find_launch() is not None) == several


def test_a_tpu_vm_without_metadata_is_alone(monkeypatch):
    monkeypatch.setattr(distributed, "_is_tpu_vm", lambda: True)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    assert find_launch() is None


@pytest.mark.parametrize(("address", "bound"), [
    ("127.0.0.1:5", "127.0.0.1:5"), ("localhost:5", "localhost:5"), ("10.0.0.1:5", None),
    (None, None)])
def test_coordinator_on_one_machine_is_not_reachable_from_others(address, bound):
    assert distributed._bind_address(address) == bound


def test_dead_process_is_noticed_in_half_a_minute_unless_set(monkeypatch):
    assert distributed._heartbeat_seconds() == 30
    monkeypatch.setenv("HIPPOCAMPUS_HEARTBEAT_SECONDS", "7")
    assert distributed._heartbeat_seconds() == 7
