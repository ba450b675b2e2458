"""Whether a load of damaged files ended as it may: with what they say, or an error that names the file, and cheaply."""

import resource
import signal
import traceback
from pathlib import Path

from kd_jax.storage.errors import RunError

# above what the process has before: this, and so many times the size of the files
ROOM, TIMES = 64 << 20, 8
CPU_SECONDS = 5.0


class TooSlow(BaseException):
    """A load took more CPU time than it may."""


def judge(target, folder: Path, cpu_seconds: float = CPU_SECONDS) -> tuple[str, tuple[str, str] | None]:
    """How a load ended ("loaded", "refused" or "fault"); what is wrong with that: its kind, and more of it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limit = ROOM + TIMES * size
    before = _forget_peak()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * limit + (1 << 30), hard))
    handler = signal.signal(signal.SIGPROF, _raise_slow)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        found = target.load(folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.check(found, folder)
        how, fault = "loaded", None
    except (ValueError, OSError, RunError) as error:
        how, fault = "refused", _unclear(error, folder)
    except BaseException as error:  # also what a library's panic is
        if isinstance(error, KeyboardInterrupt):
            raise
        how, fault = "fault", _where(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    took = _status("VmHWM") - before
    if fault is None and took > limit:
        fault = "took too much memory", f"{took >> 20} MiB for files of {size >> 10} KiB"
    return (how if fault is None else "fault"), fault


def _unclear(error: Exception, folder: Path) -> tuple[str, str] | None:
    """What is wrong with an error that a load may raise: it has to name a file of this folder, or the folder."""
    if str(folder) in str(error):
        return None
    kind, text = _where(error)
    return f"names no file: {kind}", text


def _where(error: BaseException) -> tuple[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.name}" for f in frames if "kd_jax" in f.filename or "faults" in f.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
    kind = f"{type(error).__name__} in {' > '.join(dict.fromkeys([*ours[-3:], last]))}"
    return kind, " ".join(str(error).split())[:200]


def _forget_peak() -> int:
    """Bytes this process has in memory now, from which its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _raise_slow(*_):
    raise TooSlow
