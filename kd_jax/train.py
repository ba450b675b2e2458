"""Runs one experiment from its config file to its report: python -m kd_jax.train --config C.py --workdir FOLDER."""

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kd_jax import config as config_lib

# Modules by name, so that one experiment's run does not import the others. Each has validate(config), which raises
# ValueError on bad values, and run(config, folder), which returns what to add to the manifest. Those in STAGED run in
# stages: run also takes `only` (names) and `dry_run`, and returns None where the run is not at its end yet.
EXPERIMENTS = {
    "gmm": "kd_jax.gmm.experiment",
    "gmm_frontier": "kd_jax.gmm.frontier",
    "lm": "kd_jax.lm.experiment",
}
STAGED = ("lm",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    args = config_lib.parse(argv)
    # after the command line is known to be good: JAX takes a moment to import, and a typing error need not wait for it
    from kd_jax import run as run_lib

    try:
        return _run(args, argv)
    except (ValueError, OSError, FloatingPointError, run_lib.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command carries on", file=sys.stderr)
        return 130


def _run(args: config_lib.Args, argv: list[str]) -> int:
    from kd_jax import report
    from kd_jax import run as run_lib

    start = time.perf_counter()
    config, name = args.config, args.config.get("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"config.experiment is {name!r}; it has to be one of: {', '.join(sorted(EXPERIMENTS))}")
    experiment = importlib.import_module(EXPERIMENTS[name])
    experiment.validate(config)
    staged = name in STAGED
    if not staged and (args.stages or args.dry_run):
        raise ValueError(f"--stages and --dry_run are for experiments in stages ({', '.join(STAGED)}), not for {name}")
    if args.dry_run:
        experiment.run(config, Path(args.workdir), dry_run=True)
        return 0

    run = run_lib.open_run(args.workdir, config, argv=argv, overwrite=args.overwrite, staged=staged)
    if run.finished:
        page = run.folder / "report.html"
        print(f"{run.folder}: finished, nothing left to do (report: {page}; --overwrite starts again)")
        return 0
    if run.resumed:
        print(f"{run.folder}: carrying on")

    ready = time.perf_counter()
    if staged:
        extra = experiment.run(config, run.folder, only=args.stages)
        if extra is None:
            print(f"{run.folder}: stages {', '.join(args.stages)} are finished")
            return 0
    else:
        extra = experiment.run(config, run.folder) or {}
    ran = time.perf_counter()
    page = report.write(run.folder)
    done = time.perf_counter()

    seconds = {"start": ready - start, "experiment": ran - ready, "report": done - ran, "total": done - start}
    run_lib.finish(run, **{**extra, "seconds": {key: round(value, 3) for key, value in seconds.items()}})
    print("time: " + ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items()))
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
