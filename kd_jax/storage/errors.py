"""How programs end: errors that a user can put right, and signals."""

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

# By the number of an operating system's error: what has to be done where it came up.
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "allow larger files there (ulimit -f)",
    errno.EROFS: "let it be written to",
    errno.EACCES: "let it be read and written to",
    errno.EPERM: "let it be read and written to",
}
# tensorstore's way of saying it
_NUMBER = re.compile(r"os_error_code='(\d+)'")


class RunError(Exception):
    """Something the user can put right; the message says what."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """An operating system's error in the block that says no file, or not where it is, becomes one about `path`."""
    try:
        yield
    except OSError as error:
        # shutil.rmtree goes by open folders and says the last part of the name alone
        if error.errno is None or os.path.isabs(str(error.filename or "")):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def number(error: BaseException | None) -> int | None:
    """The number of the operating system's error that this one is, or came from; None where it is no such thing."""
    while error is not None:
        found = _NUMBER.search(str(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found:
            return int(found[1])
        error = error.__cause__
    return None


def explain(error: BaseException) -> str:
    """The error's text, with what is to be done if that is known."""
    remedy = _REMEDIES.get(number(error))
    return str(error) if remedy is None else f"{error}; {remedy}, and the same command goes on"


def end_on_terminate() -> None:
    """From now on SIGTERM is what Ctrl-C is, KeyboardInterrupt: the program says so and ends with code 130."""
    if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody ask for signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def again(folder: str | os.PathLike) -> str:
    """What is to be done about a damaged file in `folder`: removed with it, or with all of its stage, it is made again.

    Nothing is removed without being asked: the damage may be the disk's, and the file be whole elsewhere.
    """
    folder = Path(folder).absolute()
    stage = next((above for above in [folder, *folder.parents] if (above / "stage.json").exists()), folder)
    return f"; remove {stage}, and the same command makes it again"
