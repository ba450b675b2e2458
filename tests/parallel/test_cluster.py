"""Which processes a run has, as the command line and the launchers say it."""

import http.server
import threading

import pytest

from kd_jax.parallel import cluster
from kd_jax.parallel.cluster import Cluster

SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[003-004,7],other", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_PROCID": "5", "SLURM_NODEID": "2",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3", "PMIX_NAMESPACE": "prterun-box-77@1",
}  # fmt: skip
FLAGS = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}


def test_alone_there_is_no_cluster():
    assert cluster.find({}, {}) is None
    assert cluster.find({"coordinator_address": None, "num_processes": None, "process_id": None}, {}) is None
    assert cluster.find({"num_processes": 1}, {}) is None
    # a job's own script, and a step of one task: nothing is started beside this process
    assert cluster.find({}, {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert cluster.find({}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert cluster.find({}, {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert cluster.find({}, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_flags():
    assert cluster.find(FLAGS, {}) == Cluster("the command line", 2, "10.0.0.1:1234", 1)
    assert cluster.find({**FLAGS, "coordinator_address": "[::1]:80"}, {}).coordinator_address == "[::1]:80"


def test_variables_stand_for_flags_and_flags_go_first():
    environ = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert cluster.find({}, environ) == Cluster("the command line", 3, "a:1", 2)
    assert cluster.find({"process_id": 0}, environ).process_id == 0


def test_srun():
    found = cluster.find({}, SRUN)
    host, port = found.coordinator_address.split(":")
    assert (found.num_processes, found.process_id, host) == (8, 5, "node003")
    assert 61440 <= int(port) < 65536
    # the same for every task of the step, another for another step
    assert cluster.find({}, {**SRUN, "SLURM_PROCID": "2"}).coordinator_address == found.coordinator_address
    assert cluster.find({}, {**SRUN, "SLURM_STEP_ID": "1"}).coordinator_address != found.coordinator_address
    first_of = {"alpha": "alpha", "alpha,beta": "alpha", "n[12,14-15]": "n12", "a-1,b-2": "a-1"}
    for nodes, first in (first_of | {"rack[1-2]node[03-04],other": "rack1node03"}).items():
        assert cluster.find({}, {**SRUN, "SLURM_STEP_NODELIST": nodes}).coordinator_address == f"{first}:{port}"
    assert cluster.find({"coordinator_address": "login:99"}, SRUN).coordinator_address == "login:99"


@pytest.mark.parametrize(
    "visible, tasks, devices",
    [
        ("0,1", "2(x4)", (1,)),  # two tasks on a node that see both of its GPUs
        ("0,1,2,3,4,5,6,7", "2(x4)", (4, 5, 6, 7)),
        ("0,1,2,3,4", "1,2,3,2", (1, 2)),  # the second of three
        ("1", "2(x4)", None),  # SLURM has given each its own
        ("0,1,2,3", "2(x2),1(x4)", None),  # one task on a node: all are its
    ],
)
def test_gpus_of_a_node_are_shared_out(visible, tasks, devices):
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    assert cluster.find({}, environ).local_devices == devices


def test_gpus_that_slurm_gave_a_task_are_its_own():
    node = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert cluster.find({}, node).local_devices == (2, 3)
    for each in ("4", "h100:4"):
        assert cluster.find({}, {**node, "SLURM_GPUS_PER_TASK": each}).local_devices is None
    # not bound: both tasks see all GPUs of the node
    assert cluster.find({}, {**node, "SLURM_GPUS_PER_TASK": "2"}).local_devices == (2, 3)


def test_gpus_that_no_variable_names_are_shared_out(monkeypatch):
    monkeypatch.setattr(cluster.Path, "glob", lambda self, _: [self / f"nvidia{i}" for i in range(8)])
    assert cluster.find({}, MPIRUN).local_devices == (6, 7)
    assert cluster.find({}, {**MPIRUN, "CUDA_VISIBLE_DEVICES": ""}).local_devices is None  # hidden


def test_mpirun_within_a_job_of_slurm():
    found = cluster.find({}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", **MPIRUN})
    assert found[:2] == ("mpirun", 4) and found.process_id == 3


def test_mpirun():
    found = cluster.find({}, {**MPIRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert found[:1] + found[3:] == ("mpirun", 3, (3,)) and found.num_processes == 4
    assert found.coordinator_address.startswith("127.0.0.1:")
    # on several machines nothing says where process 0 is
    with pytest.raises(ValueError, match="--coordinator_address .* beside mpirun"):
        cluster.find({}, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    "given, environ, said",
    [
        ({"num_processes": 2}, {}, "--coordinator_address .* and --process_id .* beside --num_processes"),
        ({"process_id": 0}, {}, "--coordinator_address .* and --num_processes"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, "--num_processes .* beside JAX_COORDINATOR_ADDRESS"),
        ({**FLAGS, "process_id": 2}, {}, "process_id=2 < 2"),
        ({**FLAGS, "process_id": -1}, {}, "process_id=-1"),
        ({**FLAGS, "num_processes": 0}, {}, "process_id=1 < 0"),
        ({"num_processes": 1, "process_id": 1, "coordinator_address": "a:1"}, {}, "process_id=1 < 1"),
        ({**FLAGS, "coordinator_address": "10.0.0.1"}, {}, "HOST:PORT"),
        ({**FLAGS, "coordinator_address": ":1234"}, {}, "HOST:PORT"),
        ({"num_processes": 2}, SRUN, "--num_processes=2, but srun says 8"),
        ({"process_id": 1}, SRUN, "--process_id=1, but srun says 5"),
    ],
)
def test_what_does_not_go_together_is_refused(given, environ, said):
    with pytest.raises(ValueError, match=said):
        cluster.find(given, environ)


def test_tpu_hosts_from_the_environment():
    assert cluster.find({}, {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == Cluster("TPU", 4)
    assert cluster.find({}, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == Cluster("TPU", 2)


def test_tpu_hosts_from_the_metadata_server(monkeypatch):
    answers, asked = {"body": "a:1:10.0.0.1,b:2:10.0.0.2", "status": 200}, []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(answers["status"])
            self.end_headers()
            self.wfile.write(answers["body"].encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(cluster.Path, "glob", lambda self, _: [self / "accel0"] if str(self) == "/dev" else [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert cluster.find({}, environ) == Cluster("TPU", 2)
        assert asked == [("/computeMetadata/v1/instance/attributes/worker-network-endpoints", "Google")]
        answers.update(body="a", status=200)
        assert cluster.find({}, environ) is None
        answers.update(body="", status=404)
        assert cluster.find({}, environ) is None
        answers.update(body="", status=500)
        with pytest.raises(ValueError, match="does not say how many hosts"):
            cluster.find({}, environ)
        server.shutdown()
    with pytest.raises(ValueError, match="--num_processes=1"):
        cluster.find({}, environ)
    assert cluster.find({"num_processes": 1}, environ) is None
