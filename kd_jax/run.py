"""Run folders: what a run was, whether it may carry on, and its rows of numbers."""

import collections
import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jaxlib
import ml_collections
import numpy as np

import kd_jax
from kd_jax import untrusted
from kd_jax.config import flatten, to_dict
from kd_jax.errors import RunError, writing

# All that a run writes into its folder, and so all that --overwrite removes.
NAMES = (
    "config.json", "manifest.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "stages", "evaluation",
    "report.html", "figures",
)  # fmt: skip

_AGAIN = "; --overwrite starts the run again"

# JSON has no such numbers; Python's own NaN token is not JSON, and other readers refuse the line.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Run(NamedTuple):
    """An open run folder."""

    folder: Path
    resumed: bool
    finished: bool


def open_run(
    workdir: str | os.PathLike, config: ml_collections.ConfigDict, *, argv: Sequence[str], overwrite: bool = False,
    staged: bool = False,
) -> Run:  # fmt: skip
    """Makes the run folder, or opens it again where it holds a run of this same config.

    A folder with another config, or with files but no run, is refused (RunError). `overwrite` starts the run
    again: it removes what a run writes (NAMES) and leaves every other file alone. A `staged` run takes another config
    of the same experiment, as its stages know what depends on what; the differences are printed.
    """
    folder = Path(workdir)
    # through JSON and back, so that it compares equal with what is read from the file
    wanted = json.loads(_dump(to_dict(config)))
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; --workdir has to be a folder")
    try:
        exists = (folder / "config.json").exists()
        if not exists and folder.is_dir():
            # a .tmp of ours is what a kill during the very first write leaves
            foreign = sorted(set(os.listdir(folder)) - {f"{name}.tmp" for name in NAMES})
            if foreign:
                raise RunError(
                    f"{folder} is not empty and holds no run (no config.json, but {foreign[0]}); "
                    "choose another --workdir"
                )
        if exists and not overwrite:
            changes = _changes(read_json(folder / "config.json", hint=_AGAIN), wanted)
            if changes and not (staged and not any(change.startswith("  experiment:") for change in changes)):
                raise RunError(
                    f"{folder} holds a run with another config:\n"
                    + "\n".join(changes)
                    + "\nchoose another --workdir, or start this one again with --overwrite"
                )
            if changes:
                print(f"{folder}: the config has changed; what depends on it is made anew\n" + "\n".join(changes))
                write_json(folder / "config.json", wanted)
                (folder / "manifest.json").unlink(missing_ok=True)
            return _reopen(folder, config, argv)
        folder.mkdir(parents=True, exist_ok=True)
        if exists:
            # config.json stays until it is replaced: without it, a kill here would leave a folder that is refused
            for name in NAMES[1:]:
                remove(folder / name)
        write_json(folder / "config.json", wanted)
        write_json(folder / "manifest.json", _manifest(config, argv))
    except OSError as error:
        raise RunError(f"cannot write the run folder {folder}: {error}") from error
    return Run(folder, resumed=False, finished=False)


class Stop:
    """Whether somebody has asked for the end, by Ctrl-C or SIGTERM: long work looks at `asked` where it can save.

    As a context manager it takes over both signals; a second one interrupts at once.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Clock:
    """Seconds by what they were spent on: `with clock("data"): ...`. What is inside another counts there alone."""

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        self._names: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


def finish(run: Run, **extra: Any) -> None:
    """Marks the run finished in its manifest, with `extra` (timings and the like) beside it."""
    path = run.folder / "manifest.json"
    write_json(path, {**read_json(path, hint=_AGAIN), **extra, "status": "finished", "finished": _now()})


@contextlib.contextmanager
def replacing(path: str | os.PathLike, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` once the block is through; else nothing is left of it.

    `partial` is where it is until then, by default beside it with .tmp at the end. Raises OSError that names the file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp") if partial is None else partial
    with writing(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except Exception:
            partial.unlink(missing_ok=True)  # a full disk needs the room
            raise


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there. Raises OSError that names it."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON file whole or not at all."""
    write_text(path, _dump(value, indent=2) + "\n")


def read_json(
    path: Path, error: type[Exception] = RunError, *, needs: dict[str, Any] | None = None, hint: str = ""
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises `error`, which names the file and ends in `hint`, where it holds no object, or one without a value of the
    type that `needs` has for a key; OSError for one that cannot be read.
    """
    path = Path(path)
    try:
        value = untrusted.parse_json(untrusted.text(path))
    except ValueError as reason:
        raise error(f"{path} is not JSON ({reason}){hint}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object{hint}")
    problem = _lack(value, needs or {})
    if problem:
        raise error(f"{path} {problem}{hint}")
    return value


def _lack(value: dict[str, Any], needs: dict[str, Any]) -> str | None:
    """What an object does not have of a value of each of these types."""
    for key, kind in needs.items():
        if not isinstance(value.get(key), kind):
            return f"has no {key}" if key not in value else f"has {key}={value[key]!r:.40}, which it cannot be"
    return None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON lines file whole or not at all."""
    write_text(path, _lines(rows))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows at the end of a JSON lines file."""
    text = _lines(rows)  # all of it first: a row that cannot be written adds nothing
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_rows(
    path: Path, needs: dict[str, Any] | None = None, *, cut: bool = False, halves: bool = False
) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, none where there is no file; `halves` as of `untrusted.parse_json`.

    With `cut` a last line without an end is left out: it is what a kill or a full disk leaves of an `append_rows`.
    RunError names a line that is broken, or has no value of the type that `needs` has for a key.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    # not the whole at once, and not by splitlines: U+2028 ends a line for it, and may be in a JSON string as it is
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not (cut and not line.endswith(b"\n")):
                rows.append(_row(line, f"{path}, line {number}", needs or {}, halves))
    return rows


def _row(line: bytes, where: str, needs: dict[str, Any], halves: bool) -> dict[str, Any]:
    try:
        row = untrusted.parse_json(str(line, "utf-8"), halves=halves)
    except ValueError as error:
        raise RunError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RunError(f"{where}: not a row (a JSON object)")
    problem = _lack(row, needs)
    if problem:
        raise RunError(f"{where} {problem}")
    return _decode(row)


def read_arrays(path: Path, *, hint: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises RunError, which names the file and ends in `hint`, where it is damaged."""
    try:
        return untrusted.arrays(path)
    except ValueError as error:
        raise RunError(f"{error}{hint}") from error


def _reopen(folder: Path, config: ml_collections.ConfigDict, argv: Sequence[str]) -> Run:
    path = folder / "manifest.json"
    if path.exists():
        manifest = read_json(path, hint=_AGAIN)
        if manifest.get("status") == "finished":
            return Run(folder, resumed=True, finished=True)
        manifest.setdefault("resumed", []).append(_now())
    else:
        manifest = _manifest(config, argv)  # killed between the two first files
    write_json(path, manifest)
    return Run(folder, resumed=True, finished=False)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each field that differs."""
    old, new = flatten(old), flatten(new)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, now = (_dump(side[key]) if key in side else "(not set)" for side in (old, new))
        if was != now:
            changes.append(f"  {key}: {was} -> {now}")
    return changes


def _manifest(config: ml_collections.ConfigDict, argv: Sequence[str]) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "status": "running",
        "started": _now(),
        "command": _command(argv),
        "seed": config.get("seed"),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "kd_jax": kd_jax.__version__,
        },
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": _git_commit(),
    }


def _command(argv: Sequence[str]) -> str:
    program, *rest = argv or ["kd_jax/train.py"]
    # `python -m kd_jax.train` shows up in sys.argv as the path of the file, which does not run from elsewhere
    start = ["python", "-m", f"kd_jax.{Path(program).stem}"]
    return shlex.join([*start, *rest])


def _git_commit() -> str | None:
    package = Path(kd_jax.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # an installed copy can lie inside some other project's repository: only a tracked one counts
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(_dump(row) + "\n" for row in rows)


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(_encode(value), indent=indent, allow_nan=False)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _encode(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(member) for member in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_decode(member) for member in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
