"""Runs one experiment from its config file to its report: python -m kd_jax.train --config C.py --workdir FOLDER.

The same command in several processes is one run over the devices of all (kd_jax.parallel.cluster says how they find
each other; launch/ has scripts that start them). FOLDER is then on a file system that all of them share.
"""

import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from kd_jax.parallel import cluster
from kd_jax.runs import config as config_lib
from kd_jax.storage import errors

# Modules by name, so that one experiment's run does not import the others. Each has validate(config), which raises
# ValueError on bad values, and run(config, folder), which returns what to add to the manifest. Those in STAGED run in
# stages: run also takes `only` (names), `dry_run` and `target`, and returns None where the run is not at its end yet.
EXPERIMENTS = {
    "gmm": "kd_jax.gmm.experiment",
    "gmm_frontier": "kd_jax.gmm.frontier",
    "lm": "kd_jax.lm.experiment.chain",
}
STAGED = ("lm",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    args = config_lib.parse(argv)
    # after the command line is known to be good: JAX takes a moment to import, and a typing error need not wait for it
    from kd_jax.parallel import distributed

    processes = None
    try:
        processes = cluster.find(args.processes)
        if processes is None:
            errors.end_on_terminate()  # one of several may be waiting for another, where it cannot be interrupted
        _run(args, argv, processes)
        distributed.end()
        return 0
    except (ValueError, OSError, FloatingPointError, errors.RunError) as error:
        code, said = 2, f"error: {distributed.name()}{errors.explain(error)}"
    except KeyboardInterrupt:
        code, said = 130, f"\n{distributed.name()}interrupted; the same command carries on"
    except Exception:
        if processes is None:
            raise
        code, said = 1, f"{distributed.name()}{traceback.format_exc()}"
    print(said, file=sys.stderr)
    if processes is not None:
        distributed.leave(code)  # JAX would wait for the others, which wait for this one
    return code


def _run(args: config_lib.Args, argv: list[str], processes: cluster.Cluster | None) -> None:
    from kd_jax import report
    from kd_jax.parallel import devices, distributed
    from kd_jax.runs import run as run_lib

    start = time.perf_counter()
    config, name = args.config, args.config.get("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"config.experiment is {name!r}; it has to be one of: {', '.join(sorted(EXPERIMENTS))}")
    if processes is not None and not args.dry_run:
        distributed.start(processes, args.initialization_timeout, args.heartbeat_timeout)
    experiment = importlib.import_module(EXPERIMENTS[name])
    staged = name in STAGED
    if not staged and (args.stages or args.dry_run):
        raise ValueError(f"--stages and --dry_run are for experiments in stages ({', '.join(STAGED)}), not for {name}")
    target = None
    if args.device:
        target = devices.target(args.device, args.mfu, args.price_per_hour)
        devices.pretend(target.devices)
    experiment.validate(config)
    if args.dry_run:
        if processes is None or not processes.process_id:
            experiment.run(config, Path(args.workdir), dry_run=True, target=target)
        return

    def open_run() -> tuple[str, bool, bool]:
        run = run_lib.open_run(args.workdir, config, argv=argv, overwrite=args.overwrite, staged=staged)
        return str(run.folder), run.resumed, run.finished

    folder, *state = distributed.once(open_run, "opening the run folder")
    run = run_lib.Run(Path(folder), *state)
    if not (run.folder / "config.json").exists():
        raise errors.RunError(
            f"process 0 has made {run.folder.absolute()}, which this process does not see: a run of several processes "
            "needs a --workdir on a file system that all of them share"
        )
    if run.finished:
        page = run.folder / "report.html"
        _say(f"{run.folder}: finished, nothing left to do (report: {page}; --overwrite starts again)")
        return
    if run.resumed:
        _say(f"{run.folder}: carrying on")

    ready = time.perf_counter()
    extra = experiment.run(config, run.folder, **({"only": args.stages} if staged else {}))
    if staged and extra is None:
        _say(f"{run.folder}: stages {', '.join(args.stages)} are finished")
        return
    ran = time.perf_counter()
    page = distributed.once(lambda: str(report.write(run.folder)), "writing the report")
    done = time.perf_counter()

    seconds = {"start": ready - start, "experiment": ran - ready, "report": done - ran, "total": done - start}
    if distributed.leads():
        run_lib.finish(run, **{**(extra or {}), "seconds": {key: round(value, 3) for key, value in seconds.items()}})
    _say("time: " + ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items()))
    _say(f"report: {page}")


def _say(text: str) -> None:
    """Prints, once for all processes."""
    from kd_jax.parallel import distributed

    if distributed.leads():
        print(text)


if __name__ == "__main__":
    sys.exit(main())
