"""tpu_scripts against a stand-in for gcloud, which writes down its calls and does them on this machine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
NAMES = ("create", "setup", "run", "logs", "fetch", "delete")
TPU = ["--name", "kd-1", "--zone", "us-central2-b"]

# `list` says what the file `state` has; create and delete write it. The machines are the folders worker-0, worker-1:
# a command for a worker is run in its folder, as in a home there, and a copy is a copy.
GCLOUD = """#!%(python)s
import json, os, shutil, subprocess, sys
from pathlib import Path

cloud, words = Path(os.environ["CLOUD"]), sys.argv[1:]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
kind, verb, *rest = words[2:]
state = cloud / "state"
wanted = "*" if flags.get("worker", "all") == "all" else flags["worker"]
workers = sorted(cloud.glob(f"worker-{wanted}"))
if kind == "queued-resources":
    if verb == "list":
        print(state.read_text(), end="")
    elif verb == "create":
        state.write_text("WAITING_FOR_RESOURCES")
    else:
        state.write_text("")
elif verb == "ssh":
    for worker in workers:
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=worker, env={**os.environ, "HOME": str(worker)})
        if done.returncode:
            sys.exit(done.returncode)
else:
    source, target = rest[:2]
    for worker in workers:
        there = [path.split(":", 1)[1] if ":" in path else None for path in (source, target)]
        shutil.copy(*(worker / end if end else path for end, path in zip(there, (source, target))))
"""
# In place of what setup installs, and of kd_jax.train: it says its flags, and ends when it is told to.
PYTHON = """#!/usr/bin/env bash
if [ "$2" = kd_jax.train ]; then
  trap 'echo saved; exit 130' TERM
  echo "started: ${*@Q}"
  exec -a "python -m kd_jax.train" bash -c 'trap "echo saved; exit 130" TERM; while :; do sleep 0.05; done'
fi
echo "$*" >>"$HOME/installed"
if [ "$3" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder that stands for the cloud, with the stand-ins on PATH."""
    for name, text in {"gcloud": GCLOUD % {"python": sys.executable}, "python3": PYTHON}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for worker in range(2):
        (tmp_path / f"worker-{worker}").mkdir()
    (tmp_path / "state").write_text("")
    (tmp_path / "calls").write_text("")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("POLL_SECONDS", "0.1")
    for name in ("TPU_NAME", "TPU_ZONE", "TPU_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    for pid in tmp_path.glob("worker-*/kd_jax/train.pid"):
        if process(pid) is not None:
            os.kill(process(pid), signal.SIGKILL)


def process(path):
    """The number of the process of a pid file; None where it is gone."""
    pid = int(path.read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return None
    return None if state == "Z" else pid


def call(name, *arguments, code=0, **options):
    done = subprocess.run(
        [SCRIPTS / f"{name}.sh", *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        **options,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def calls(cloud):
    """What gcloud was called with since the last look, without the words that all calls have."""
    found = [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]
    (cloud / "calls").write_text("")
    for words in found:
        assert words[:2] == ["compute", "tpus"] and "--zone=us-central2-b" in words and "--quiet" in words
    return [[word for word in words[2:] if word not in ("--zone=us-central2-b", "--quiet")] for words in found]


LIST = ["queued-resources", "list", "--filter=name ~ /queuedResources/kd-1$", "--format=value(state.state)"]
DELETE = ["queued-resources", "delete", "kd-1", "--force"]


def test_create_asks_once(cloud):
    call("create", *TPU, "--type", "v5litepod-16", "--spot", "--network=net", "--service_account", "a@b")
    create = [
        "queued-resources", "create", "kd-1", "--node-id=kd-1", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--network=net", "--service-account=a@b", "--spot",
    ]  # fmt: skip
    assert calls(cloud) == [LIST, create]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        (cloud / "state").write_text(state)
        assert f"there already: {state}" in call("create", *TPU, "--type=v5litepod-16")
        assert calls(cloud) == [LIST]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_replaces_what_is_gone(cloud, state):
    (cloud / "state").write_text(state)
    call("create", *TPU, "--type=v6e-8")
    assert [words[:3] for words in calls(cloud)] == [LIST[:3], DELETE[:3], ["queued-resources", "create", "kd-1"]]


def test_create_waits(cloud):
    (cloud / "state").write_text("PROVISIONING")
    with subprocess.Popen([SCRIPTS / "create.sh", *TPU, "--type=v6e-8", "--wait"], stdout=subprocess.PIPE) as waiting:
        time.sleep(1)
        assert waiting.poll() is None
        # at once: the script must not read a file that is still empty
        (cloud / "next").write_text("ACTIVE")
        (cloud / "next").replace(cloud / "state")
        assert waiting.wait(timeout=30) == 0
    (cloud / "state").write_text("SUSPENDING")
    assert "SUSPENDING" in call("create", *TPU, "--type=v6e-8", "--wait", code=2)


@pytest.mark.parametrize(
    "type_, image",
    {
        "v4-8": "tpu-ubuntu2204-base", "v5litepod-1": "v2-alpha-tpuv5-lite", "v5p-8": "v2-alpha-tpuv5",
        "v6e-256": "v2-alpha-tpuv6e",
    }.items(),
)  # fmt: skip
def test_image_by_type(cloud, type_, image):
    call("create", *TPU, f"--type={type_}")
    assert f"--runtime-version={image}" in calls(cloud)[1]
    (cloud / "state").write_text("")
    call("create", *TPU, f"--type={type_}", "--runtime_version=mine")
    assert "--runtime-version=mine" in calls(cloud)[1]


@pytest.mark.slow
def test_from_set_up_to_fetched(cloud, tmp_path):
    workers = [cloud / f"worker-{i}" for i in range(2)]
    for _ in range(2):  # again: nothing is in the way
        call("setup", *TPU)
    for worker in workers:
        assert (worker / "kd_jax/kd_jax/train.py").is_file() and not (worker / "kd_jax/.git").exists()
        installed = (worker / "installed").read_text().splitlines()
        assert installed[:3] == [
            "-m pip install --quiet --user uv", "-m uv venv --quiet --seed --allow-existing --python 3.12 .venv",
            "-m uv pip install --quiet --python .venv/bin/python --editable .[tpu]",
        ]  # fmt: skip
    assert all(words[0] == "tpu-vm" and "--worker=all" in words for words in calls(cloud))

    train = ["--config", "configs/gmm.py:smoke", "--workdir", "runs/a b", "--config.seed=3"]
    call("run", *TPU, "--", *train)
    pids = [worker / "kd_jax/train.pid" for worker in workers]
    logs = [worker / "kd_jax/train.log" for worker in workers]
    wait_for(lambda: all("started" in log.read_text() for log in logs))
    assert all(shlex.split(log.read_text())[1:] == ["-m", "kd_jax.train", *train] for log in logs)
    assert "is running already" in call("run", *TPU, "--", *train, code=1)
    assert "started" in call("logs", *TPU, "--worker=1", "--lines", "5")

    call("run", *TPU, "--stop")
    wait_for(lambda: all(process(pid) is None for pid in pids))
    assert all(log.read_text().endswith("saved\n") for log in logs)
    assert call("run", *TPU, "--stop").count("nothing is running") == 2
    call("run", *TPU, "--", *train)  # goes on
    wait_for(lambda: logs[0].read_text().count("started") == 2)

    run = workers[0] / "kd_jax/runs/a"
    (run / "stages").mkdir(parents=True)
    (run / "stages/large").touch()
    (run / "report.html").write_text("the report")
    call("fetch", *TPU, "--run", "a", "--to", tmp_path / "here")
    assert (tmp_path / "here/a/report.html").read_text() == "the report"
    assert not (tmp_path / "here/a/stages").exists()
    call("fetch", *TPU, "--run=a", f"--to={tmp_path / 'here'}", "--all")
    assert (tmp_path / "here/a/stages/large").exists() and os.listdir(tmp_path / "here") == ["a"]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stand_in_for_nfs(cloud, chmod):
    """A share that cannot be written to, not even by root: a link to nowhere."""
    mount = 'echo "$*" >>"$HOME/mounts"; rmdir runs; ln -s "$HOME/share" runs'
    texts = {"sudo": '"$@"', "mount": mount, "mount.nfs": "", "mountpoint": '[ -e "$HOME/mounts" ]', "chmod": chmod}
    for name, text in texts.items():
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)


@pytest.mark.slow
def test_shared_folder_is_mounted_once_and_made_writable(cloud):
    stand_in_for_nfs(cloud, 'mkdir "$HOME/share"')
    for _ in range(2):
        call("setup", *TPU, "--nfs", "10.0.0.2:/share")
    assert [(cloud / f"worker-{i}/mounts").read_text() for i in range(2)] == ["-t nfs 10.0.0.2:/share runs\n"] * 2
    assert all((cloud / f"worker-{i}/share").is_dir() for i in range(2))


@pytest.mark.slow
def test_a_share_that_stays_read_only_is_said(cloud):
    stand_in_for_nfs(cloud, "exit 1")
    assert "error: kd_jax/runs cannot be written to" in call("setup", *TPU, "--nfs=10.0.0.2:/share", code=1)


def test_delete(cloud):
    assert "there is no kd-1" in call("delete", *TPU, "--yes")
    assert calls(cloud) == [LIST]
    (cloud / "state").write_text("ACTIVE")
    assert "--yes" in call("delete", *TPU, code=2)  # nobody can answer
    assert calls(cloud) == [LIST]
    call("delete", *TPU, "--yes")
    assert calls(cloud) == [LIST, DELETE]


def pasted(cloud):
    """Another cloud, with no machines in it."""
    (cloud / "pasted").mkdir()
    (cloud / "pasted/state").write_text("")
    return cloud / "pasted"


@pytest.mark.parametrize(
    "name, arguments, commands",
    [
        ("create", ["--type=v6e-8"], 2),
        ("setup", [], 2),
        ("run", ["--", "--config", "c.py"], 1),
        ("run", ["--stop"], 1),
        ("logs", [], 1),
        ("fetch", ["--run=a"], 2),
        ("delete", [], 2),
    ],
)
def test_dry_run_prints_the_commands_and_calls_nothing(cloud, monkeypatch, name, arguments, commands):
    monkeypatch.setenv("TPU_NAME", "kd-1")
    monkeypatch.setenv("TPU_ZONE", "us-central2-b")
    said = call(name, "--dry_run", "--project=p", *arguments)
    # pasted into a shell, they are these calls
    assert (cloud / "calls").read_text() == ""
    subprocess.run(["bash", "-c", said], check=True, env={**os.environ, "CLOUD": str(pasted(cloud))})
    found = [json.loads(line) for line in (cloud / "pasted/calls").read_text().splitlines()]
    assert len(found) == commands and all("--project=p" in words and "--zone=us-central2-b" in words for words in found)
    assert (cloud / "calls").read_text() == "" and not list(cloud.glob("worker-*/*"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_or_unknown_is_said_before_any_call(cloud, name):
    assert f"usage: tpu_scripts/{name}.sh" in call(name, "--help")
    for arguments, said in {
        ("--zone=z",): "--name (or TPU_NAME) is missing",
        ("--name=a",): "--zone (or TPU_ZONE) is missing",
        ("--name=A_b", "--zone=z"): "small letters",
        ("--nane=a",): "unknown flag --nane=a",
        ("--name",): "--name needs a value",
    }.items():
        text = call(name, *arguments, code=2)
        assert said in text and f"usage: tpu_scripts/{name}.sh" in text
    assert (cloud / "calls").read_text() == ""


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("create", [], "--type is missing"),
        ("create", ["--type=v9-8"], "--runtime_version"),
        ("setup", ["--nfs=nowhere"], "SERVER:/PATH"),
        ("run", [], "flags of kd_jax.train are missing"),
        ("run", ["--stop", "--", "--config"], "--stop takes no flags"),
        ("logs", ["--worker=x"], "--worker=x"),
        ("logs", ["--worker=all", "--follow"], "one worker"),
        ("fetch", [], "--run"),
        ("fetch", ["--run=../.ssh"], "--run='../.ssh'"),
    ],
)
def test_bad_arguments(cloud, name, arguments, said):
    assert said in call(name, *TPU, *arguments, code=2)
    assert (cloud / "calls").read_text() == ""


def test_no_project_or_zone_is_baked_in():
    for path in SCRIPTS.glob("*.sh"):
        assert not re.search(r"--(project|zone)[= ][a-z0-9]", path.read_text()), path
