"""Kills a run again and again, until it has ended so many times, and compares it with one that nobody has killed.

    python -m tests.faults.soak --rounds 50 --config configs/lm_laptop.py:smoke --seed 0

A round is a start that is killed (SIGKILL) at a moment drawn at random: after some CPU time, whatever goes on then, or
at one of the program's own writes, renamings or removals of files, or a few milliseconds later. Once a start comes to
the end, all numbers of the run, the rows of its corpora and its weights are held to those of the run that was left
alone, and the next round begins a new run. The same seed draws the same moments.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import runs

# The share of a run that one start gets through at the most: so a run is killed several times before it ends.
SHARE = 0.35
MOMENTS = ("cpu", "any", "rename", "remove")


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


def moment(rng, workdir, events, spent, share):
    """Orders for a kill at a random moment."""
    kind = rng.choice([name for name in MOMENTS if name in ("cpu", "any") or events.get(name)])
    first, counts = events["cpu"], {name: n for name, n in events.items() if name != "cpu"}
    if kind == "cpu":
        return {"kill_cpu": round(rng.uniform(0.5 * first, first + share * (spent - first)), 3)}
    total = sum(counts.values()) if kind == "any" else counts[kind]
    orders = {"folder": str(workdir), "kill_at": rng.randint(1, max(1, round(share * total)))}
    orders |= {} if kind == "any" else {"events": [kind]}
    return orders | {"delay": round(rng.choice([0, rng.uniform(0, 0.03), rng.uniform(0, 0.3)]), 4)}


def soak(subject, rounds, seed, say=print, share=SHARE):
    """So many rounds; returns how many runs they ended as. Raises AssertionError where anything differs."""
    began, rng = time.monotonic(), random.Random(seed)
    wanted, events, spent = subject.straight()
    say(f"left alone: {spent:.0f} s of CPU; {events}", flush=True)
    kills = ends = in_a_row = 0
    workdir, finished = subject.home / "killed-0", {}
    while kills < rounds or in_a_row:
        # once all rounds are through, the last run is left to end
        faults = moment(rng, workdir, events, spent, share) if kills < rounds else None
        code = subject.start(workdir, faults, [0, -9])
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
        say(f"run {ends} has ended, with the numbers of the one left alone", flush=True)
        shutil.rmtree(workdir)
        workdir = subject.home / f"killed-{ends}"
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--config", default="configs/lm_laptop.py:smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="a new folder, which stays; by default a temporary one")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = args.home or Path(temporary)
        os.makedirs(home, exist_ok=True)
        ends = soak(Subject(home.absolute(), [args.config, *flags]), args.rounds, args.seed)
    print(f"{args.rounds} kills, {ends} runs ended: all numbers are those of the run that was left alone")


if __name__ == "__main__":
    sys.exit(main())
