"""Accelerators: programs lowered for them from any machine, and one script that measures the one that is here.

python -m benchmarks.accelerator --lower --shape 135m    lowers every program for cuda and tpu, and checks it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from benchmarks.accelerators import lowering, programs


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def some(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--lower", action="store_true", help="lower the programs; nothing is run")
    parser.add_argument("--programs", type=some, default=list(programs.PROGRAMS), metavar="A,B")
    parser.add_argument("--platforms", type=some, default=list(programs.PLATFORMS), metavar="cuda,tpu")
    parser.add_argument("--shape", choices=programs.SHAPES, default="135m")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    results = lowering.run(args.shape, args.platforms, args.programs)
    faults = sum(bool(one.faults) for one in results)
    print(f"{len(results) - faults} of {len(results)} programs are as they should be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
