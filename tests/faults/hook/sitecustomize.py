"""Faults from inside a program, for tests: with this folder on PYTHONPATH every Python reads its orders from FAULTS.

FAULTS is a JSON object:
    folder: what counts is what happens to files below it.
    count: a file to write {"KIND": events so far, ..., "cpu": seconds of this program until the first} into.
    kill_at: the number of the event before which the program is killed (SIGKILL).
    events: which kinds of events (values of EVENTS) kill_at counts; all of them by default.
    delay: seconds from that event to the kill, which then falls into what comes after it.
    kill_cpu: the seconds of CPU time after which it is killed, whatever it does then.
    signal: the signal for that, by default SIGKILL.
    jump: seconds by which time.time() jumps ahead, and back again, at every other call.

An event is what the interpreter itself tells before it does something (sys.addaudithook), whichever library asks.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time

# Audit events by what they are here; os.replace is told as a rename, os.unlink as a removal.
EVENTS = {
    "open": "write", "os.truncate": "write", "os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove",
    "os.rmdir": "remove",
}  # fmt: skip


class Hook:
    """Counts events below a folder, and kills the program where it is to be killed."""

    def __init__(self, orders):
        self.folder = os.path.realpath(orders["folder"]) + os.sep
        self.kinds = orders.get("events") or [*EVENTS.values()]
        self.kill_at, self.delay = orders.get("kill_at"), orders.get("delay", 0.0)
        self.seen, self.lock = {"cpu": None}, threading.RLock()
        self.file = orders.get("count") and os.open(orders["count"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event, arguments):
        if event not in EVENTS or not self.concerns(event, arguments):
            return
        kind = EVENTS[event]
        with self.lock:
            if self.seen["cpu"] is None:
                self.seen["cpu"] = time.process_time()
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.file is not None:
                os.pwrite(self.file, json.dumps(self.seen).encode(), 0)
            if kind in self.kinds and sum(self.seen.get(kind, 0) for kind in set(self.kinds)) == self.kill_at:
                threading.Timer(self.delay, kill).start() if self.delay else kill()

    def concerns(self, event, arguments):
        path = arguments[0]
        if event == "open" and not writes(*arguments[1:]):
            return False
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a file that is open already
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            # relative to an open folder, as shutil.rmtree has it, or to the current one
            descriptor = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else os.getcwd(), path)
        return os.path.abspath(path).startswith(self.folder)


def writes(mode, flags):
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds, number):
    while time.process_time() < seconds:
        time.sleep(0.002)
    os.kill(os.getpid(), number)


def jump(seconds):
    true, ahead = time.time, itertools.cycle([seconds, 0])
    time.time = lambda: true() + next(ahead)


if "FAULTS" in os.environ:
    orders = json.loads(os.environ["FAULTS"])
    if "jump" in orders:
        jump(orders["jump"])
    if "kill_cpu" in orders:
        number = orders.get("signal", signal.SIGKILL)
        threading.Thread(target=kill_after, args=[orders["kill_cpu"], number], daemon=True).start()
    if "folder" in orders:
        sys.addaudithook(Hook(orders))
