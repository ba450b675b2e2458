"""Runs one experiment from its config file to its report: python -m kd_jax.train --config CONFIG --workdir FOLDER.

The same command in several processes is one run over the devices of all (kd_jax.parallel.cluster says how they find
each other; launch/ has scripts that start them). FOLDER is then on a file system that all of them share.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kd_jax.runs import command_line, settings
from kd_jax.runs import config as config_lib
from kd_jax.storage import errors

# Modules by name, so that one experiment's run does not import the others. Each has
#   Spec                    its settings (kd_jax.runs.settings); the functions below take them frozen
#   validate(spec)          raises ValueError on settings that cannot work, before any work
#   run(spec, folder)       does the work; returns what to add to the manifest
#   result(folder)          optional: the lines that sum up a finished run; without it kd_jax.report.result has them
# Those in STAGED run in stages: run also takes `only` (names), `dry_run` and `target`, and returns None where the run
# is not at its end yet. A module without Spec takes the config as the file has it.
EXPERIMENTS = {
    "gmm": "kd_jax.gmm.experiment",
    "gmm_frontier": "kd_jax.gmm.frontier",
    "lm": "kd_jax.lm.experiment.chain",
}
STAGED = ("lm",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parse, lambda args: _run(args, argv), argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m kd_jax.train",
        usage="%(prog)s --config CONFIG[:ARG] --workdir FOLDER [flags] [--config.KEY=VALUE ...]",
        description="Runs one experiment from its config to its report. The same command resumes a run that was "
        "stopped.\nWith --config, --help also lists its settings; --flagfile FILE reads flags from a file.",
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", type=command_line.path, metavar="FOLDER", help="the run folder")
    parser.flag("overwrite", "start the run in this folder again")
    add("--stages", type=_names, default=(), metavar="A,B", help="run only these stages, for experiments in stages")
    plan = parser.add_argument_group("planning")
    parser.flag("dry_run", "show the stages and what they cost; nothing is written", group=plan)
    add = plan.add_argument
    add("--device", default="", metavar="8xH100", help="plan for these devices (with --dry_run)")
    add("--mfu", type=float, metavar="SHARE", help="share of peak FLOP/s that training reaches (from published runs)")
    add("--price_per_hour", type=float, metavar="PRICE", help="price of one device for an hour, in any currency")
    command_line.add_processes(parser)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    args = config_lib.parse(words, _parser(), spec_of)
    if not args.workdir:
        raise ValueError("--workdir is missing (for example --workdir runs/gmm)")
    if args.device and not args.dry_run:
        raise ValueError("--device is for --dry_run; a run takes the devices that are there")
    if not args.device and (args.mfu is not None or args.price_per_hour is not None):
        raise ValueError("--mfu and --price_per_hour describe the devices of --dry_run --device")
    name = args.config.experiment
    if name not in STAGED and (args.stages or args.dry_run):
        raise ValueError(f"--stages and --dry_run are for experiments in stages ({', '.join(STAGED)}), not for {name}")
    return args


def _experiment(config: ConfigDict) -> Any:
    """The module of the experiment that a config names. Raises ValueError for an unknown name."""
    name = config.get("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"config.experiment is {name!r}; it must be one of: {', '.join(sorted(EXPERIMENTS))}")
    return importlib.import_module(EXPERIMENTS[name])


def spec_of(config: ConfigDict) -> type | None:
    """The class of the experiment's settings; None for an experiment without one."""
    return getattr(_experiment(config), "Spec", None)


def _freeze(config: ConfigDict) -> tuple[Any, dict[str, Any]]:
    """What the experiment's functions take, and what config.json holds."""
    kind = spec_of(config)
    if kind is None:
        return config, config_lib.to_dict(config)
    # `experiment` says whose settings they are, and may or may not be one of them
    named = {key: config[key] for key in config if key != "experiment" or key in kind.__dataclass_fields__}
    spec = settings.freeze(kind, named)
    return spec, {"experiment": config.experiment, **settings.to_dict(spec)}


def _dry_run(args: argparse.Namespace, experiment: Any, spec: Any) -> None:
    from kd_jax.parallel import cluster, devices

    processes = cluster.find({name: getattr(args, name) for name in cluster.NAMES})
    target = None
    if args.device:
        target = devices.target(args.device, args.mfu, args.price_per_hour)
        # before anything asks JAX for its devices
        devices.pretend(target.devices)
    # The settings are checked with the planned devices in place, since the mesh has to fit them.
    experiment.validate(spec)
    if processes is None or not processes.process_id:
        experiment.run(spec, Path(args.workdir), only=args.stages, dry_run=True, target=target)


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    start = time.perf_counter()
    if args.dry_run:
        return _dry_run(args, _experiment(args.config), _freeze(args.config)[0])
    # Joined before anything asks JAX for its devices, as the checks of the settings do.
    command_line.start_processes(args)
    carry_out(args.config, args.workdir, argv, overwrite=args.overwrite, stages=args.stages, start=start)


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the key, for settings that cannot work, before any work."""
    _experiment(config).validate(_freeze(config)[0])


def carry_out(
    config: ConfigDict, workdir: str, argv: list[str], *, overwrite: bool = False, stages: Sequence[str] = (),
    shared_stages: Path | None = None, start: float | None = None,
) -> None:  # fmt: skip
    """Runs an experiment in its folder from the config to the report, or resumes it.

    Several processes have been joined before.

    Args:
        config: of the experiment.
        workdir: the run folder.
        argv: the command that makes this run, for its manifest.
        overwrite: start the run again.
        stages: of an experiment in stages, the groups to run; by default all.
        shared_stages: a folder that has the stages of several runs; by default each run has its own.
        start: when the command began, in seconds of time.perf_counter; by default now.
    Raises: ValueError for settings that cannot work, before any work; what the experiment raises.
    """
    from kd_jax.runs import run as run_lib

    start = time.perf_counter() if start is None else start
    experiment, (spec, plain) = _experiment(config), _freeze(config)
    experiment.validate(spec)
    staged = config.experiment in STAGED
    with command_line.writing(workdir, argv):
        run = _open(lambda: run_lib.open_run(workdir, plain, argv=argv, overwrite=overwrite, staged=staged))
        if run.finished:
            say(f"{run.folder}: finished, nothing left to do (--overwrite starts again)")
            _say_result(experiment, run.folder)
            return
        if run.resumed:
            say(f"{run.folder}: resuming")
        if staged and shared_stages is not None:
            _link_stages(run.folder, shared_stages)
        _work(run, experiment, spec, {"only": tuple(stages)} if staged else {}, start)


def _work(run: Any, experiment: Any, spec: Any, options: dict[str, Any], start: float) -> None:
    """What is left to do of a run; `start` is when the command began, in seconds of time.perf_counter."""
    from kd_jax import report
    from kd_jax.parallel import distributed
    from kd_jax.runs import run as run_lib

    ready = time.perf_counter()
    extra = experiment.run(spec, run.folder, **options)
    if options and extra is None:
        say(f"{run.folder}: stages {', '.join(options['only'])} are finished")
        return
    ran = time.perf_counter()
    # Process 0 draws; the others wait, as the run is not finished without its page.
    distributed.once(lambda: str(report.write(run.folder)), "writing the report")
    done = time.perf_counter()

    seconds = {"start": ready - start, "experiment": ran - ready, "report": done - ran, "total": done - start}
    if distributed.leads():
        run_lib.finish(run, **{**(extra or {}), "seconds": {key: round(value, 3) for key, value in seconds.items()}})
    say("time: " + ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items()))
    _say_result(experiment, run.folder)


def _link_stages(folder: Path, shared: Path) -> None:
    """Makes the stages of a run those of a folder that other runs use as well; one that has its own keeps them."""
    from kd_jax.parallel import distributed

    def link() -> None:
        shared.mkdir(parents=True, exist_ok=True)
        if not (folder / "stages").exists():
            # Relative, so that the folder of all runs can be moved.
            (folder / "stages").symlink_to(os.path.relpath(shared, folder), target_is_directory=True)

    distributed.once(link, "linking the stages")


def _open(open_run: Callable[[], Any]) -> Any:
    """The run folder, which process 0 makes or opens for all. Raises RunError where another does not see it."""
    from kd_jax.parallel import distributed
    from kd_jax.runs import run as run_lib

    def values() -> tuple[str, bool, bool]:
        run = open_run()
        return str(run.folder), run.resumed, run.finished

    # One process makes the folder: two at once would each find the other's files in it.
    folder, *state = distributed.once(values, "opening the run folder")
    run = run_lib.Run(Path(folder), *state)
    if not (run.folder / "config.json").exists():
        raise errors.RunError(
            f"process 0 has made {run.folder.absolute()}, which this process does not see: a run of several processes "
            "needs a --workdir on a file system that all of them share"
        )
    return run


def say(text: str) -> None:
    """Prints, once for all processes."""
    from kd_jax.parallel import distributed

    if distributed.leads():
        print(text, flush=True)


def _say_result(experiment: Any, folder: Path) -> None:
    """Prints the end of a run's output: its result, where there is a summary, and the path of its page."""
    from kd_jax import report
    from kd_jax.parallel import distributed

    if distributed.leads():
        for line in getattr(experiment, "result", report.result)(folder):
            print(line)
        print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
