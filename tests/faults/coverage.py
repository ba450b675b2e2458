"""The same, guided by which branches of the readers are reached: `python -m tests.faults.coverage config -runs=20000`.

Needs atheris (pip install atheris), which nothing else here does. The first word is the loader's name, of whose first
file the bytes are chosen; the others are libFuzzer's options. It ends at the first fault, with the file that shows it.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kd_jax"]):
    from tests.faults.targets import TARGETS

from tests.faults.fuzz import copy
from tests.faults.judge import judge


def main() -> None:
    name, *options = sys.argv[1:]
    target, work = TARGETS[name], Path(tempfile.mkdtemp(prefix="coverage-"))
    whole, seeds = work / "whole", work / "seeds"
    whole.mkdir()
    seeds.mkdir()
    target.build(whole)
    target.load(copy(whole, work / "case"))  # all there is to compile and import
    path = target.files(whole)[0].relative_to(whole)
    (seeds / "whole").write_bytes((whole / path).read_bytes())
    warnings.simplefilter("ignore")
    logging.disable()

    def one(data: bytes) -> None:
        folder = copy(whole, work / "case")
        (folder / path).write_bytes(data)
        target.after(folder, folder / path)
        how, fault = judge(target, folder)
        if fault is not None:
            raise AssertionError(f"{name}: {fault}")

    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
