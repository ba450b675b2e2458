"""Kills a run again and again, until it has ended so many times, and compares it with one that nobody has killed.

    python -m tests.faults.soak --rounds 50 --config configs/lm_laptop.py:smoke --seed 0

A round is a start that is killed (SIGKILL) at a moment drawn at random: after some CPU time, whatever goes on then, or
at one of the program's own writes, renamings or removals of files, or a few milliseconds later. Once a start comes to
the end, all numbers of the run, the rows of its corpora and its weights are held to those of the run that was left
alone, and the next round begins a new run. The same seed draws the same moments.

    --moments cpu term     only such moments; `term` is SIGTERM, after which a run has to save what it has and end
    --clocks               the clock jumps by years within each start, and files get times in the past and the future
"""

import argparse
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import runs

# The share of a run that one start gets through at the most: so a run is killed several times before it ends.
SHARE = 0.35
MOMENTS = ("cpu", "any", "rename", "remove")
YEARS = 1e8


class Subject:
    """A run to be killed.

    Args:
        home: a folder for all that is made here, programs that were compiled included.
        words: the config, and further flags.
    """

    def __init__(self, home, words):
        self.home, self.words = Path(home), list(words)
        more = {"KD_JAX_CACHE": home / "cache", "JAX_COMPILATION_CACHE_DIR": home / "cache" / "compiled"}
        more |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = {name: str(value) for name, value in more.items()}

    def start(self, workdir, faults, code):
        """Starts the run, which ends with one of the codes; returns which."""
        words = runs.command(workdir, *self.words)
        done = subprocess.run(
            words, cwd=runs.ROOT, env=runs.environment(faults, **self.environment), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode in code, f"{workdir}: code {done.returncode}, with {faults}\n{done.stdout[-6000:]}"
        return done.returncode

    @functools.cached_property
    def straight(self):
        """The run that is left alone: its numbers, its events by kind, and its CPU seconds."""
        workdir, count = self.home / "straight", self.home / "events.json"
        for _ in range(2):  # the second finds its programs compiled, as all later ones do
            shutil.rmtree(workdir, ignore_errors=True)
            before = cpu_seconds()
            self.start(workdir, {"folder": str(workdir), "count": str(count)}, [0])
            spent = cpu_seconds() - before
        events = json.loads(count.read_text())
        runs.check_whole(workdir)
        return runs.numbers(workdir), events, spent


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def moment(rng, workdir, events, spent, moments):
    """Orders for a kill at a random moment."""
    kind = rng.choice([name for name in moments if name in ("cpu", "term", "any") or events.get(name)])
    first, counts = events["cpu"], {name: n for name, n in events.items() if name != "cpu"}
    if kind in ("cpu", "term"):
        least = first if kind == "term" else 0.5 * first  # before that Python itself takes SIGTERM, as it always does
        orders = {"kill_cpu": round(rng.uniform(least, first + SHARE * (spent - first)), 3)}
        return orders | ({"signal": int(signal.SIGTERM)} if kind == "term" else {})
    total = sum(counts.values()) if kind == "any" else counts[kind]
    orders = {"folder": str(workdir), "kill_at": rng.randint(1, max(1, round(SHARE * total)))}
    orders |= {} if kind == "any" else {"events": [kind]}
    return orders | {"delay": round(rng.choice([0, rng.uniform(0, 0.03), rng.uniform(0, 0.3)]), 4)}


def move_times(rng, workdir):
    """Every file of a run gets a time of its own, years away."""
    for path in workdir.rglob("*"):
        then = time.time() + rng.uniform(-YEARS, YEARS)
        os.utime(path, (then, then))


def soak(subject, rounds, seed, moments=MOMENTS, clocks=False):
    """So many rounds; returns how many runs they ended as. Raises AssertionError where anything differs."""
    began, rng, say = time.monotonic(), random.Random(seed), functools.partial(print, flush=True)
    wanted, events, spent = subject.straight
    say(f"left alone: {spent:.0f} s of CPU; {events}")
    kills = ends = in_a_row = 0
    workdir, finished = subject.home / "killed-0", {}
    while kills < rounds or in_a_row:
        # once all rounds are through, the last run is left to end
        faults = moment(rng, workdir, events, spent, moments) if kills < rounds else {}
        faults |= {"jump": rng.choice([-YEARS, YEARS])} if clocks else {}
        code = subject.start(workdir, faults, [0, 130 if "signal" in faults else -signal.SIGKILL])
        if clocks and workdir.exists():
            move_times(rng, workdir)
        if code:
            kills, in_a_row = kills + 1, in_a_row + 1
            now = runs.finished_stages(workdir)
            assert finished.items() <= now.items(), f"{workdir}: a stage that was finished has been begun again"
            say(
                f"{kills} of {rounds}: {faults}; {len(now)} stages finished; {time.monotonic() - began:.0f} s",
                flush=True,
            )
            finished = now
            continue
        runs.check_whole(workdir)
        assert finished.items() <= runs.finished_stages(workdir).items(), f"{workdir}: finished work was done again"
        found = runs.numbers(workdir)
        different = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        assert not different, (
            f"{workdir}, after {in_a_row} kills: other {different} than in {subject.home / 'straight'}"
        )
        ends, in_a_row, finished = ends + 1, 0, {}
        say(f"run {ends} has ended, with the numbers of the one left alone")
        shutil.rmtree(workdir)
        workdir = subject.home / f"killed-{ends}"
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--config", default="configs/lm_laptop.py:smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", choices=(*MOMENTS, "term"), default=MOMENTS)
    parser.add_argument("--clocks", action="store_true")
    parser.add_argument("--home", type=Path, help="a new folder, which stays; by default a temporary one")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = args.home or Path(temporary)
        os.makedirs(home, exist_ok=True)
        subject = Subject(home.absolute(), [args.config, *flags])
        ends = soak(subject, args.rounds, args.seed, args.moments, args.clocks)
    print(f"{args.rounds} kills, {ends} runs ended: all numbers are those of the run that was left alone")


if __name__ == "__main__":
    sys.exit(main())
