"""Errors that the user can mend, and how programs end on signals."""

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

# What to do about an operating system's error, by its number.
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "allow larger files there (ulimit -f)",
    errno.EROFS: "let it be written to",
    errno.EACCES: "let it be read and written to",
    errno.EPERM: "let it be read and written to",
}
# how tensorstore's messages give the number
_NUMBER = re.compile(r"os_error_code='(\d+)'")


class RunError(Exception):
    """Something that the user can mend; the message says how."""


class Absent(RunError):
    """Other processes of the run are not there; the same command may find them."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes an OSError in the block that does not name a full path one about `path`."""
    try:
        yield
    except OSError as error:
        # shutil.rmtree works on open folders, so its errors name the last part of the path only
        if error.errno is None or os.path.isabs(str(error.filename or "")):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def number(error: BaseException | None) -> int | None:
    """The number of the operating system's error behind an error; None where there is none."""
    while error is not None:
        found = _NUMBER.search(str(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # tensorstore's errors have the number in their text only.
        if found:
            return int(found[1])
        # Behind a library's error stands the one that caused it.
        error = error.__cause__
    return None


def explain(error: BaseException) -> str:
    """The error's message, with the remedy if there is a known one."""
    remedy = REMEDIES.get(number(error))
    return str(error) if remedy is None else f"{error}; {remedy}, and the same command resumes"


def end_on_terminate() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, like Ctrl-C."""
    if threading.current_thread() is threading.main_thread():  # Python sets signal handlers in the main thread only
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def again(folder: str | os.PathLike) -> str:
    """The remedy for a damaged file in `folder`: remove the folder, or its whole stage, and run again.

    Nothing is removed automatically: there may be a whole copy elsewhere.
    """
    folder = Path(folder).absolute()
    stage = next((above for above in [folder, *folder.parents] if (above / "stage.json").exists()), folder)
    return f"; remove {stage}, and the same command makes it again"
