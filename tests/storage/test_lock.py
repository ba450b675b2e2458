"""One writer for a folder: who is refused, whose lock is taken over, and that two never hold it."""

import json
import os
import subprocess
import sys
import time

import pytest

from kd_jax.storage import lock
from kd_jax.storage.errors import RunError

HOLD = """
import sys, time
from kd_jax.storage import lock
lock.BEAT, lock.STALE = 0.05, float(sys.argv[2])
with lock.held(sys.argv[1], "train --workdir w"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 1.0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "1.0"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def as_another_machine(folder):
    """The lock as if its process were another machine's: it cannot be looked up. Returns the function that beats."""
    path = folder / lock.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "elsewhere", "host": "node7"}))


def test_a_second_writer_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(RunError) as refused, lock.held(tmp_path / "run", "sample"):
        pass
    message = str(refused.value)
    assert f"process {holder.pid} on {os.uname().nodename} writes it since 20" in message
    assert "train --workdir w" in message and str(tmp_path / "run") in message
    holder.communicate("\n", timeout=30)
    with lock.held(tmp_path / "run", "sample"):
        assert lock.contents(tmp_path / "run") == [] and os.listdir(tmp_path / "run") == [lock.NAME]


def test_a_folder_is_made_for_the_lock_and_kept_only_if_something_is_written(tmp_path):
    with lock.held(tmp_path / "a/b", "x"):
        pass
    assert not (tmp_path / "a").exists()
    with lock.held(tmp_path / "a/b", "x"):
        (tmp_path / "a/b/c").touch()
    assert os.listdir(tmp_path / "a/b") == ["c"]
    with pytest.raises(RunError, match="is a file"), lock.held(tmp_path / "a/b/c", "x"):
        pass


def test_the_lock_of_a_dead_process_is_taken_over_at_once(holder, tmp_path):
    holder.kill()  # not waited for: a zombie is as dead as one that is gone
    time.sleep(0.2)
    start = time.monotonic()
    with lock.held(tmp_path / "run", "y"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["command"] == "y"
    assert time.monotonic() - start < 0.9


def test_a_process_with_the_number_of_a_dead_one_does_not_count(tmp_path):
    (tmp_path / lock.NAME).write_text(
        json.dumps({**lock._process(), "start": "1", "command": "", "since": "", "token": "t"})
    )
    with lock.held(tmp_path, "y"):
        pass


def test_another_machine_with_a_heartbeat_is_refused_and_without_one_taken_over(holder, tmp_path):
    as_another_machine(tmp_path / "run")
    with pytest.raises(RunError, match="on node7"), lock.held(tmp_path / "run", "y"):
        pass


def test_another_machine_without_a_heartbeat_is_taken_over_after_the_time(tmp_path, capsys):
    other = {**lock._process(), "machine": "elsewhere", "host": "node7", "command": "z", "since": "then", "token": "t"}
    (tmp_path / lock.NAME).write_text(json.dumps(other))
    start = time.monotonic()
    with lock.held(tmp_path, "y"):
        assert 0.8 < time.monotonic() - start < 10
    assert "on node7 writes it since then (z)" in capsys.readouterr().err
    (tmp_path / lock.NAME).write_text(json.dumps(other))
    os.utime(tmp_path / lock.NAME, (1e9, 1e9))  # long ago: nothing to wait for
    start = time.monotonic()
    with lock.held(tmp_path, "y"):
        assert time.monotonic() - start < 0.8
    assert capsys.readouterr().err == ""


def test_a_process_that_was_suspended_ends_when_it_sees_that_its_lock_was_taken(holder, tmp_path):
    path = tmp_path / "run" / lock.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "other", "command": "mine"}))
    assert holder.wait(timeout=30) == 2
    error = holder.stderr.read()
    assert "took the folder over" in error and "mine" in error
    assert path.exists()


def test_a_file_system_that_fails_for_a_moment_does_not_end_the_heartbeat(tmp_path, monkeypatch):
    read, failed = lock._read, []

    def reading(path):
        if not failed:
            failed.append(path)
            raise OSError(116, "Stale file handle")
        return read(path)

    with lock.held(tmp_path, "x"):
        monkeypatch.setattr(lock, "_read", reading)
        time.sleep(0.3)
        before = os.stat(tmp_path / lock.NAME).st_mtime
        time.sleep(0.3)
        assert failed and os.stat(tmp_path / lock.NAME).st_mtime > before


def test_a_lock_that_was_removed_by_hand_comes_back(holder, tmp_path):
    path = tmp_path / "run" / lock.NAME
    path.unlink()
    for _ in range(100):
        time.sleep(0.05)
        if path.exists():
            break
    with pytest.raises(RunError, match=str(holder.pid)), lock.held(tmp_path / "run", "y"):
        pass


def test_a_lock_that_a_full_disk_left_empty_is_taken_over(tmp_path):
    (tmp_path / lock.NAME).touch()
    with lock.held(tmp_path, "y"):
        assert json.loads((tmp_path / lock.NAME).read_text())["command"] == "y"


def test_a_lock_that_was_empty_and_is_given_back_is_not_replaced(tmp_path, monkeypatch):
    """Replacing is for dead locks: between looking and replacing, another process can have made a new one."""
    path, sleep = tmp_path / lock.NAME, time.sleep
    path.touch()  # as another process leaves it for a moment, between making and writing it

    def meanwhile(seconds):
        path.unlink(missing_ok=True)
        monkeypatch.setattr(time, "sleep", sleep)

    monkeypatch.setattr(time, "sleep", meanwhile)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the lock was replaced"))
    with lock.held(tmp_path, "y"):
        assert json.loads(path.read_text())["command"] == "y"


RACE = """
import os, sys, time
from kd_jax.storage import lock
from kd_jax.storage.errors import RunError
folder, rounds, inside = sys.argv[1], int(sys.argv[2]), sys.argv[1] + "/inside"
won = 0
for _ in range(rounds):
    try:
        with lock.held(folder, "race"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another one is in here
            time.sleep(0.002)
            os.unlink(inside)
            won += 1
            if len(sys.argv) > 3 and won == 5:
                os._exit(0)  # as a kill does: the lock stays
    except RunError:
        time.sleep(0.001)
print(won)
"""


@pytest.mark.parametrize("dying", [0, 2])
def test_two_never_hold_it(tmp_path, dying):
    (tmp_path / "keep").touch()
    command = [sys.executable, "-c", RACE, str(tmp_path), "60"]
    racers = [
        subprocess.Popen(
            [*command, *(["die"] if i < dying else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(4)
    ]
    ended = [racer.communicate(timeout=120) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), [error for _, error in ended]
    assert sum(int(out or 0) for out, _ in ended) > 0
    assert os.listdir(tmp_path) == ["keep"] or lock.contents(tmp_path) == ["keep"]
