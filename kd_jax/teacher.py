"""Records a teacher with a corpus: its K likeliest next tokens at each position, and the probability of all others.

    python -m kd_jax.teacher --corpus FOLDER --model SOURCE --top_k 64 --out FOLDER

What is written is the corpus once more with three further columns (kd_jax.lm.corpus.shards.TOP_K): at most 4 bytes
for each recorded token on disk. A student learns from it without the teacher (config.distill.policy "offline"). The
same command resumes a run that was stopped.
"""

import argparse
import sys
from collections.abc import Sequence

from kd_jax.runs import command_line
from kd_jax.storage import files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parser().parse_args, lambda args: _run(args, argv), argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m kd_jax.teacher", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--corpus",
        type=command_line.path,
        metavar="FOLDER",
        required=True,
        help="the corpus to score",
    )
    add("--model", metavar="SOURCE", required=True, help="the teacher: anything that kd_jax.lm.weights.load takes")
    add("--top_k", type=command_line.number(int, at_least=1), metavar="K", default=64,
        help="how many ids are recorded at each position (64)")  # fmt: skip
    add(
        "--out",
        type=command_line.path,
        metavar="FOLDER",
        required=True,
        help="folder of the scored corpus",
    )
    add("--log_prob_format", choices=("uint16", "float32"), default="uint16", help="values rounded, or exact (uint16)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the teacher (float32)")
    add("--mesh", type=command_line.mesh_sizes, metavar="data=2,tensor=4", help="sizes of the axes of the device mesh")
    command_line.add_processes(parser)
    return parser


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    command_line.start_processes(args)
    with command_line.writing(args.out, argv):
        _record(args, argv)


def _record(args: argparse.Namespace, argv: list[str]) -> None:
    # Imported here: --help and typing errors do not wait for JAX.
    from kd_jax.lm import corpus, weights
    from kd_jax.lm.distill import recorded_top_k
    from kd_jax.lm.model import Compute
    from kd_jax.parallel import distributed
    from kd_jax.runs import cache

    source = corpus.open(args.corpus)
    cache.enable_compilation_cache()
    mesh = command_line.mesh(args.mesh)
    model = weights.load(args.model, dtype=args.dtype, mesh=mesh)
    about = recorded_top_k.settings(
        model, files.absolute(args.model), args.top_k, args.log_prob_format, args.dtype,
        corpus.fingerprint(source),
    )  # fmt: skip
    held = recorded_top_k.score_corpus(
        source, args.out, model, about, command=command_line.command(argv), label="teacher",
        compute=Compute(dtype=args.dtype), mesh=mesh,
    )  # fmt: skip
    if not distributed.leads():
        return
    size, entries = sum(shard["bytes"] for shard in held.manifest["shards"]), recorded_top_k.num_entries(held)
    # What recording added: the corpus itself is in both.
    before = sum(shard["bytes"] for shard in source.manifest["shards"])
    print(f"{held.num_rows} rows, {entries} recorded tokens of {(size - before) / entries:.2f} bytes, tails included")
    print(f"corpus: {held.folder}")


if __name__ == "__main__":
    sys.exit(main())
