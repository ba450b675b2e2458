"""How cost grows: time and memory of each program against its sizes, and the exponent of each.

    python -m benchmarks.growth [--out FOLDER] [--figure]

Prints a table, and writes growth.json and growth.png into FOLDER (by default docs); with --figure only the figure, from
the JSON that is there. An exponent is the slope of log cost over log size by least squares: 1 is proportional, and what
does not depend on the size lowers it. Beside it is the slope of the last step alone, where fixed costs weigh least.

Time is the median of five runs after one to warm up, in this process. Memory is XLA's analysis of the compiled program:
outputs and temporary buffers, and of arguments those that grow; not the weights, moments and inputs named below. Over
devices, which are virtual CPU devices, programs are compiled and not run: a row counts what one device needs in all,
and what it has after the collectives of an update, with two rows of tokens for each device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import fused
from kd_jax.gmm import em
from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill.loss import cross_entropy
from kd_jax.lm.experiment import footprint
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.parallel import collectives
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.reporting import figures
from kd_jax.runs import cache

SHAPE = Architecture(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rope_theta=10000.0,
)  # fmt: skip
LENGTH = 128  # tokens of a row
SAMPLE = 48  # tokens of a sample
POINTS, COMPONENTS, ITERATIONS = 500, 4, 20  # of an EM fit
RUNS = 5


class Work(NamedTuple):
    """A program at one size: what runs it once, and the bytes that it needs (see above)."""

    run: Callable[[], Any]
    bytes: int


class Case(NamedTuple):
    """A program, what it is measured against, at which sizes, and what is fixed."""

    program: str
    knob: str
    sizes: tuple[int, ...]
    make: Callable[[int], Work]
    fixed: str


def scoring(tokens: int) -> Work:
    model = _model()
    ids = jnp.asarray(_ids(tokens // LENGTH, LENGTH))
    compiled = score.lower(model, ids, Compute()).compile()
    return Work(lambda: compiled(model.params, ids, (None,)), _beside(compiled, model.params))


def updating(tokens: int) -> Work:
    schedule = optim.wsd(1e-4, 100, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    rows = tokens // LENGTH
    batch = batches.arrange(list(_ids(rows, LENGTH)), np.ones(rows, int), batches.Layout(rows, max_length=LENGTH))
    batch = state_lib.place(batch, None)
    states = [state_lib.init(jax.random.key(0), SHAPE, optimizer)]
    program = update_lib.make(cross_entropy(SHAPE, Compute()), optimizer, schedule)
    compiled = update_lib.compiled(program, SHAPE, optimizer).lower(states[0], batch).compile()

    def run():
        # The update donates the state: each run takes that of the run before.
        states[0], metrics = compiled(states[0], batch)
        return metrics

    return Work(run, _beside(compiled, states[0]))


def sampling(slots: int) -> Work:
    model = _model()
    compiled = decode.lower(model, 1, max_length=SAMPLE, batch_size=slots).compile()
    options = {"max_length": SAMPLE, "batch_size": slots}
    return Work(lambda: decode.generate(model, [1], slots, **options), _beside(compiled, model.params))


def loss(tokens: int, vocabulary: int) -> Work:
    """Forward KL of a teacher and a student of width 128, with the gradients, from hidden states and heads."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = tokens, vocabulary, tokens, vocabulary
    arrays = [jax.random.normal(key, (count, SHAPE.hidden_size)) / 8 for key, count in zip(keys, rows, strict=True)]

    def value(hidden, head, teacher_hidden, teacher_head):
        return fused.linear_distillation(
            teacher_hidden=teacher_hidden, teacher_head=teacher_head, student_hidden=hidden, student_head=head,
            labels=None, mask=jnp.ones(tokens, bool),
        )[0].mean  # fmt: skip

    compiled = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(*arrays).compile()
    return Work(lambda: compiled(*arrays), _beside(compiled, arrays))


def em_sweep(students: int) -> Work:
    data = jax.random.normal(jax.random.key(0), (students, POINTS, 2))

    def one(key, points):
        return em.fit(key, points, COMPONENTS, init="random", max_iter=ITERATIONS, tol=0.0)

    arguments = jax.random.split(jax.random.key(1), students), data
    compiled = jax.jit(jax.vmap(one)).lower(*arguments).compile()
    return Work(lambda: compiled(*arguments), _beside(compiled, data))


CASES = (
    Case("scoring", "tokens", (512, 2048, 8192, 32768), scoring, "weights"),
    Case("update", "tokens", (256, 1024, 4096, 16384), updating, "weights and moments"),
    Case("sampling", "slots", (8, 64, 512), sampling, "weights"),
    Case("fused loss", "vocabulary", (1024, 4096, 16384, 65536), lambda v: loss(512, v), "inputs"),
    Case("fused loss", "tokens", (128, 512, 2048, 8192), lambda n: loss(n, 8192), "inputs"),
    Case("EM sweep", "students", (32, 128, 512, 2048), em_sweep, "points"),
)
DEVICES = (1, 2, 4, 8)


def _model() -> Model:
    # No EOS: every sample has the same number of tokens.
    return Model(SHAPE, model_lib.init(jax.random.key(0), SHAPE), eos_ids=())


def _ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE.vocab_size, (rows, length), np.int32)


def _beside(compiled: Any, fixed: Any) -> int:
    """Bytes of the program without those of the arguments `fixed`."""
    return footprint.memory(compiled).total - mesh_lib.device_bytes(fixed)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """A row: the case, its sizes, and seconds and bytes at each."""
    works = [case.make(size) for size in case.sizes]
    took: list[list[float]] = [[] for _ in works]
    # The sizes in turn, so that other work on the machine meets all of them alike.
    for _ in range(RUNS + 1):
        for work, times in zip(works, took, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(work.run())
            times.append(time.perf_counter() - began)
    costs = {"seconds": [statistics.median(times[1:]) for times in took], "bytes": [work.bytes for work in works]}
    return {"program": case.program, "knob": case.knob, "sizes": case.sizes, "fixed": case.fixed, "costs": costs}


def over_devices() -> list[dict[str, Any]]:
    """Rows of an update over more and more devices: bytes that one needs, and that it receives."""
    from benchmarks.collectives import compiled

    rows = []
    for axis, sizes in (("data", lambda n: (n, 1, 1)), ("fsdp", lambda n: (1, n, 1))):
        programs = [compiled("training", sizes(count)) for count in DEVICES]
        print(f"compiled over {axis}", file=sys.stderr, flush=True)
        costs = {
            "bytes": [footprint.memory(program).total for program in programs],
            "received": [sum(collectives.totals(collectives.read(one.as_text())).values()) for one in programs],
        }
        rows.append(
            {
                "program": "update, one device",
                "knob": f"devices ({axis})",
                "sizes": DEVICES,
                "fixed": "",
                "costs": costs,
            }
        )
    return rows


def exponents(sizes: list[int], costs: list[float]) -> tuple[float, float]:
    """Slopes of log cost over log size: by least squares, and between the last two sizes. Costs of 0 are left out."""
    kept = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost]
    x, y = np.log2(np.array(kept, np.float64)).T
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def _rounded(exponent: float) -> str:
    return f"{round(exponent, 2) + 0.0:.2f}"  # no minus before 0


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each program, size and cost."""
    forms = {"seconds": (1e3, "ms"), "bytes": (2**-20, "MiB"), "received": (2**-20, "MiB received")}
    print(f"{'program':20}{'against':16}{'from':>6} {'to':>6}  {'exponent':>8} {'last':>6}  costs")
    for row in rows:
        for name, costs in row["costs"].items():
            scale, unit = forms[name]
            slope, last = exponents(row["sizes"], costs)
            numbers = ", ".join(f"{scale * cost:.4g}" for cost in costs)
            print(f"{row['program']:20}{row['knob']:16}{row['sizes'][0]:6} {row['sizes'][-1]:6}", end="")
            print(f"  {_rounded(slope):>8} {_rounded(last):>6}  {numbers} {unit}")


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each program and size: its costs as multiples of the first, and a line of what is proportional."""
    # Okabe and Ito's colours, a marker each, and a label at each line: told apart without colour too.
    looks = {
        "seconds": ("#0072B2", "o", "● time"), "bytes": ("#D55E00", "s", "■ memory"),
        "received": ("#009E73", "^", "▲ received"),
    }  # fmt: skip
    canvas = figures.canvas(11, 5.4)
    for axes, row in zip(canvas.subplots(2, 4, sharey=True).flat, rows, strict=True):
        sizes = row["sizes"]
        axes.plot(sizes, np.array(sizes) / sizes[0], color="#999999", linestyle=":", linewidth=1.2, zorder=1)
        ends = []
        for name, costs in row["costs"].items():
            colour, marker, word = looks[name]
            kept = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost]
            x, y = np.array(kept, float).T
            axes.plot(x, y / y[0], color=colour, marker=marker, markersize=5, linewidth=1.8)
            ends.append((y[-1] / y[0], f"{word} {_rounded(exponents(sizes, costs)[0])}", colour))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sizes if len(sizes) < 5 else sizes[::2]
        axes.set(title=row["program"], xlabel=row["knob"], xticks=ticks, xticklabels=ticks, ylim=(2**-3.5, 2**9))
        axes.minorticks_off()
        # Exponents in the corner that the lines leave free, in the order of the lines.
        for place, (_, text, colour) in enumerate(sorted(ends, reverse=True)):
            axes.text(0.05, 0.93 - 0.11 * place, text, color=colour, transform=axes.transAxes, va="top", fontsize=9,
                      fontweight="bold")  # fmt: skip
        figures.tidy(axes)
    for axes in canvas.axes[::4]:
        held = [2**i for i in range(-3, 10, 3)]
        axes.set(ylabel="times the first", yticks=held, yticklabels=["1/8", *map(str, held[1:])])
    canvas.suptitle("How cost grows: numbers are exponents, the dotted line is proportional", fontsize=11)
    canvas.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER")
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--devices", action="store_true", help=argparse.SUPPRESS)  # of its own process
    flags = parser.parse_args(argv)
    cache.enable_compilation_cache()
    if flags.devices:
        # Never run: no time is spent on making the programs fast, and their buffers are the same.
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES[-1])
        print(json.dumps(over_devices()))
        return
    kept = flags.out / "growth.json"
    if not flags.figure:
        rows = []
        for case in CASES:
            print(f"measuring {case.program} against {case.knob} ...", file=sys.stderr, flush=True)
            rows.append(measure(case))
        command = [sys.executable, "-m", "benchmarks.growth", "--devices"]
        rows += json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        kept.write_text(json.dumps(rows, indent=1) + "\n")
    rows = json.loads(kept.read_text())
    show(rows)
    figure(rows, flags.out / "growth.png")
    print(f"wrote {kept} and {flags.out / 'growth.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
