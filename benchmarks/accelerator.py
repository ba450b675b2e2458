"""Accelerators: one script that measures the device that is here, and programs lowered for devices that are not.

    python -m benchmarks.accelerator                         parity with a CPU, then times; 8 minutes at most on an H100
    python -m benchmarks.accelerator --lower --shape 135m    lowers every program for cuda and tpu, and checks it
    python -m benchmarks.accelerator --compile v5e:2x4       compiles them for TPUs that are not here (needs libtpu)

The first prints a table and writes it as JSON. Weights are random unless --weights names a model, which parity then
uses. Each part has a share of --seconds; cases that come too late for it are left out, with a line that says so. Where
the device does not compute what a CPU does, nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerators import lowering, measures, parity, programs
from kd_jax.runs import cache

# Parts in their order, and the share of the time that is over when each has to end. What a part leaves is the next's.
PARTS = {
    "device": (measures.of_device, 0.2),
    "updates": (measures.updates, 0.6),
    "losses": (measures.losses, 0.7),
    "sampling": (measures.sampling, 0.85),
    "mixtures": (measures.mixtures, 0.9),
    "attention": (measures.attentions, 1.0),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def some(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--seconds", type=float, default=480, help="the whole run ends about then")
    parser.add_argument("--weights", metavar="PATH", help="a model, as kd_jax.lm.weights.load takes it")
    parser.add_argument("--json", type=Path, default=Path("accelerator.json"), help="where the rows are written")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--lower", action="store_true", help="lower the programs; nothing is run")
    parser.add_argument("--compile", metavar="v5e:2x4", help="compile the programs for these TPUs; nothing is run")
    parser.add_argument("--programs", type=some, default=list(programs.PROGRAMS), metavar="A,B")
    parser.add_argument("--platforms", type=some, default=list(programs.PLATFORMS), metavar="cuda,tpu")
    parser.add_argument("--shape", choices=programs.SHAPES, default="135m")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # of parity's own process
    args = parser.parse_args(argv)
    if args.lower:
        return lower(args.shape, args.platforms, args.programs)
    if args.compile:
        jax.config.update("jax_platforms", "cpu")
        return int(not lowering.compile_for(args.compile, args.shape, args.programs))
    cache.enable_compilation_cache()
    if args.reference:
        parity.reference(args.weights, args.tiny, args.reference)
        return 0
    return measure(args.seconds, args.weights, args.tiny, args.json)


def lower(shape: str, platforms: Sequence[str], names: Sequence[str]) -> int:
    """Exit code 1 where a program is not as it should be."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    results = lowering.run(shape, platforms, names)
    faults = sum(bool(one.faults) for one in results)
    print(f"{len(results) - faults} of {len(results)} programs are as they should be")
    return 1 if faults else 0


def measure(limit: float, weights: str | None, tiny: bool, path: Path) -> int:
    """Exit code 1 where a case failed; cases that do not fit the memory or the time are left out."""
    began, device = time.perf_counter(), jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}; the first of {jax.device_count()} devices is measured")
    rows: list[dict[str, Any]] = []

    def add(part: str, row: dict[str, Any]) -> None:
        rows.append({"part": part, **row})
        print(_line(rows[-1]), flush=True)
        about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "tiny": tiny}
        # after each row: what was measured is kept whatever happens to the rest
        path.write_text(json.dumps({**about, "seconds": time.perf_counter() - began, "rows": rows}, indent=1))

    for row in parity.measure(weights, tiny):
        add("parity", row)
    sizes = measures.TINY if tiny else measures.WHOLE_SIZE
    for part, (cases_of, share) in PARTS.items():
        for name, case in cases_of(sizes).items():
            late = time.perf_counter() - began > share * limit
            add(part, {"case": name, **({"skipped": "no time was left"} if late else _values(case))})
    print(f"{time.perf_counter() - began:.0f} s; {path}")
    return int(any("failed" in row for row in rows))


def _values(case: measures.Case) -> dict[str, Any]:
    """What a case returns; why it does not, where the device has too little memory or the case fails."""
    try:
        return case()
    except (
        Exception
    ) as error:  # time on a device is dear: the other cases still run, and the exit code says that one failed
        if "RESOURCE_EXHAUSTED" in str(error):
            return {"skipped": "it does not fit this device's memory"}
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _line(row: dict[str, Any]) -> str:
    start = f"{row['part']:10} {row['case']:32}"
    for key in ("skipped", "failed"):
        if key in row:
            return f"{start} {key}: {row[key]}"
    more = (
        f"{name} {value:.3g}" for name, value in row.items() if name not in ("part", "case", "value", "unit") and value
    )
    return f"{start} {row['value']:12.4g} {row['unit']:10} " + ", ".join(more)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
