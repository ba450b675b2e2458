"""launch/slurm on a real SLURM of this one machine, where it is installed and may be started:

sudo apt-get install slurmctld slurmd slurm-client munge
sudo .venv/bin/python -m pytest -m cluster tests/launch/test_slurm.py
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from kd_jax.runs import stages
from kd_jax.storage.files import read_json, read_rows
from tests.processes import ROOT, free_port

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "squeue", "scontrol")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)) or os.geteuid() != 0, reason="needs SLURM, as root"),
]

# `high` takes the machine from `low`, whose jobs have a minute to save and go back into the queue.
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 OverSubscribe=NO
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A controller and a node; SLURM's commands find them by SLURM_CONF."""
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    text = CONFIG.format(folder=folder, host=host, controller=free_port(), daemon=free_port())
    (folder / "slurm.conf").write_text(text)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
         f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c", "-N", host],
    ]  # fmt: skip
    daemons = []
    for command in commands:
        out = open(folder / f"{command[0]}.out", "w")
        daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        time.sleep(1)
    wait_for(lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"), 60)
    yield folder
    subprocess.run(["scancel", "--user=root"], check=False)
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)
    del os.environ["SLURM_CONF"]


def ask(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, ask("squeue") + ask("scontrol", "show", "jobs")
        time.sleep(0.3)


def state(job):
    return re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", job))[1]


def submit(folder, *words, stages_=(), name="run", flags=()):
    """Submits to SLURM; numbers of the jobs."""
    command = [
        "launch/slurm/submit.sh", "--partition=low", "--ntasks=2", f"--output={folder}/%j.log", *words, *stages_, "--",
        "--config", "configs/lm_laptop.py:smoke", "--workdir", str(folder / name), "--config.seeds=1",
        "--config.taus=(0.5,)", *flags,
    ]  # fmt: skip
    env = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


def release(job):
    """Starts a job that is back in the queue; by itself SLURM waits two minutes."""
    wait_for(lambda: state(job) == "PENDING")
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def log(folder, job):
    path = folder / f"{job}.log"
    return path.read_text() if path.exists() else ""


def updates(run):
    """How many updates of the teacher are in its rows."""
    return max(
        [row["step"] for path in run.glob("stages/teacher-*") for row in read_rows(path / "metrics.jsonl")] or [0]
    )


# long enough that a signal comes into the middle of it
LONG = ("--config.train.epochs=400", "--config.train.log_every=1")


def test_stages_one_after_the_other(slurm, tmp_path):
    jobs = submit(tmp_path, stages_=("p_star", "teacher,samples", "direct,tau-0.5", "evaluation"))
    assert [state(job) for job in jobs[1:]] == ["PENDING"] * 3
    wait_for(lambda: state(jobs[-1]) in ("COMPLETED", "FAILED", "CANCELLED"), 1200)
    assert [state(job) for job in jobs] == ["COMPLETED"] * 4, "".join(log(tmp_path, job) for job in jobs)
    assert read_json(tmp_path / "run/manifest.json")["status"] == "finished"
    assert read_json(tmp_path / "run/manifest.json")["device"]["count"] == 2  # two tasks, a device each
    assert (tmp_path / "run/report.html").exists()
    assert "report:" in log(tmp_path, jobs[-1]) and log(tmp_path, jobs[-1]).count("report:") == 1


def test_a_stage_that_fails_takes_the_next_with_it(slurm, tmp_path):
    first, second = submit(tmp_path, stages_=("nonsense", "teacher"))
    wait_for(lambda: state(first) == "FAILED")
    assert "'nonsense' is not one of" in log(tmp_path, first)
    wait_for(lambda: state(second) == "CANCELLED")


def test_on_notice_a_job_saves_and_goes_on(slurm, tmp_path):
    (job,) = submit(tmp_path, stages_=("p_star,teacher",), flags=LONG)
    wait_for(lambda: updates(tmp_path / "run") >= 20)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # as SLURM does before the time is up
    wait_for(lambda: "back into the queue" in log(tmp_path, job))
    release(job)
    stopped = updates(tmp_path / "run")
    assert 20 <= stopped < 2400
    wait_for(lambda: "start 2" in log(tmp_path, job), 300)
    wait_for(lambda: updates(tmp_path / "run") > stopped)
    assert "resuming" in log(tmp_path, job)
    (teacher,) = (tmp_path / "run/stages").glob("teacher-*")
    rows = [row["step"] for row in read_rows(teacher / "metrics.jsonl") if row["kind"] == "training"]
    assert rows == list(range(1, len(rows) + 1))  # none twice, none left out
    assert stages.record(teacher)["starts"] == 2
    subprocess.run(["scancel", job], check=True)
    wait_for(lambda: state(job) == "CANCELLED" and "RUNNING" not in ask("squeue", "--noheader", "--format=%T"))
    time.sleep(3)
    assert state(job) == "CANCELLED" and "start 3" not in log(tmp_path, job)


def test_a_job_that_is_pre_empted_goes_on(slurm, tmp_path):
    (job,) = submit(tmp_path, stages_=("p_star,teacher",), flags=LONG)
    wait_for(lambda: updates(tmp_path / "run") >= 20)
    command = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--ntasks=2",
        f"--output={tmp_path}/%j.log",
        "--wrap=sleep 5",
    ]
    other = ask(*command).strip()
    wait_for(lambda: state(other) == "COMPLETED", 300)
    release(job)
    stopped = updates(tmp_path / "run")
    wait_for(lambda: "start 2" in log(tmp_path, job), 300)
    wait_for(lambda: updates(tmp_path / "run") > stopped)
    (teacher,) = (tmp_path / "run/stages").glob("teacher-*")
    rows = [row["step"] for row in read_rows(teacher / "metrics.jsonl") if row["kind"] == "training"]
    assert rows == list(range(1, len(rows) + 1))
    subprocess.run(["scancel", job], check=True)
