"""Damaged files for every loader: `python -m tests.faults.fuzz --seconds 300 --seed 0`.

A load gives what the file says or raises an error of the project's that names the file; it takes neither much memory
nor long. Each loader is run in a process of its own (so that one which dies is noticed) with hypothesis choosing what
to damage. Prints how many cases there were, how they ended, and every kind of fault once, with the folder that shows
it; the exit code is 1 where there was any.
"""

import argparse
import collections
import faulthandler
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all loaders together")
    parser.add_argument("--cases", type=int, default=100, help="of each loader in a round (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of loaders")
    parser.add_argument("--keep", type=Path, help="where folders that show a fault are kept")
    parser.add_argument("--undrawn", action="store_true", help="pages without figures, which take most of their time")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return _inside(args) if args.inside else _rounds(args)


def _rounds(args) -> int:
    """Processes one after the other, each with a seed of its own, until the time is up."""
    from tests.faults.targets import TARGETS

    names, began = args.only or list(TARGETS), time.monotonic()
    counts, faults = collections.defaultdict(collections.Counter), {}
    keep = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    number = 0
    while number == 0 or (time.monotonic() - began < args.seconds < math.inf):
        for name in names:
            if number and time.monotonic() - began >= args.seconds:
                break
            more = ["--cases", str(args.cases), *(["--undrawn"] if args.undrawn else [])]
            _one_process(name, args.seed + number, more, keep, counts[name], faults)
        number += 1
    print(f"{sum(sum(of.values()) for of in counts.values())} cases in {time.monotonic() - began:.0f} s")
    for name, of in counts.items():
        print(f"  {name}: {sum(of.values())} ({', '.join(f'{count} {how}' for how, count in sorted(of.items()))})")
    for fault in faults.values():
        print(f"FAULT {fault}")
    return 1 if faults else 0


def _one_process(name, seed, more, keep, counts, faults) -> None:
    command = [sys.executable, "-m", "tests.faults.fuzz", "--inside", "--only", name, "--seed", str(seed)]
    done = subprocess.run([*command, *more, "--keep", str(keep)], cwd=ROOT, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    if said is None:
        counts["dead"] += 1
        place = copy(keep / f"{name}-now".replace(" ", "_"), keep / f"{name}-{seed}-dead".replace(" ", "_"))
        why = [line for line in done.stderr.splitlines() if not line.startswith("Extension modules")][-20:]
        faults.setdefault((name, done.returncode), "\n".join([f"{name}: exit {done.returncode} ({place})", *why]))
        return
    counts.update(said["counts"][name])
    for key, text in said["faults"].items():
        faults.setdefault(key, text)


def _inside(args) -> int:
    """The cases of some loaders in this process; a JSON object on the last line of stdout."""
    from kd_jax.reporting import page
    from tests.faults import pages
    from tests.faults.targets import TARGETS

    os.environ["HF_HUB_OFFLINE"] = "1"
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()  # libraries say at length what they could not read
    report = sys.unraisablehook
    # writes of tensorstore that end after a failed load has closed its event loop
    sys.unraisablehook = lambda one: "Event loop is closed" in str(one.exc_value) or report(one)
    if args.undrawn:
        page.embed = pages.undrawn
    counts, faults = {}, {}
    for name in args.only or TARGETS:
        with tempfile.TemporaryDirectory() as work:
            counts[name] = _cases(name, TARGETS[name], Path(work), args, faults)
    print(json.dumps({"counts": counts, "faults": faults}))
    return 0


def _cases(name, target, work, args, faults) -> dict[str, int]:
    import hypothesis
    from hypothesis import strategies as st

    from tests.faults.judge import judge

    whole = work / "whole"
    whole.mkdir()
    target.build(whole)
    target.check(target.load(copy(whole, work / "case")), work / "case")  # all there is to compile and import
    counts = collections.Counter()

    def case(data):
        folder = copy(whole, work / "case")
        path = data.draw(st.sampled_from(target.files(folder)))
        before = path.read_bytes()
        after = data.draw(target.strategy(path)(before))
        path.write_bytes(after)
        target.after(folder, path)
        _keep(folder, args.keep, f"{name}-now")
        how, fault = judge(target, folder)
        counts["no change" if before == after and how == "loaded" else how] += 1
        if fault is not None and f"{name}: {fault[0]}" not in faults:
            place = _keep(folder, args.keep, f"{name}-{args.seed}-{len(faults)}")
            faults[f"{name}: {fault[0]}"] = f"{name}: {path.name}: {fault[0]}: {fault[1]} ({place})"

    settings = hypothesis.settings(
        max_examples=args.cases, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    hypothesis.seed(args.seed)(settings(hypothesis.given(st.data())(case)))()
    return counts


def copy(whole: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(whole, folder))


def _keep(folder: Path, keep: Path | None, name: str) -> Path | None:
    return None if keep is None else copy(folder, keep / name.replace(" ", "_"))


if __name__ == "__main__":
    sys.exit(main())
