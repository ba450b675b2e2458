"""Data as a corpus of token ids on disk: `kd-jax corpus stories.jsonl --out FOLDER --tokenizer SOURCE`.

Documents of text, lists of ids, or conversations become rows that other commands take: `kd-jax teacher --corpus`,
`kd-jax evaluate --corpus`, `kd-jax sample --read`. A run makes its own corpora: its config names the data
(config.data.source), or the files of a corpus with config.data.ids_column=tokens. The same command resumes one that was
stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kd_jax.runs import command_line
from kd_jax.runs.command_line import number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parser().parse_args, lambda args: _make(args, argv), argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m kd_jax.corpus", description=__doc__)
    count = number(int, at_least=1)
    add = parser.add_argument
    add("data", metavar="DATA", help="a file, a folder, a glob in quotes, or a data set's id on the Hugging Face hub")
    add("--out", type=command_line.path, metavar="FOLDER", required=True, help="folder of the corpus")
    add("--tokenizer", metavar="SOURCE", required=True, help="a folder, file or id with a tokenizer, such as p*'s")
    add("--max_length", type=number(int, at_least=2), default=512, metavar="L", help="longest row in tokens (512)")
    add("--num_samples", type=count, metavar="N", help="how many rows (all there are)")
    add("--first", type=number(int, at_least=0), default=0, metavar="I",
        help="place of the first row: ranges of one seed that do not overlap share no document (0)")  # fmt: skip
    add("--seed", type=number(int, at_least=0, below=2**32), default=0, help="of the order of the documents (0)")
    add("--shard_size", type=count, default=1024, metavar="ROWS", help="rows in one file (1024)")
    group = parser.add_argument_group("what a document is (one of: text, ids, messages, or prompt and response)")
    for kind, help in (
        ("text", "texts (text)"), ("ids", "lists of token ids"), ("messages", "conversations"),
        ("prompt", "requests, whose answers are in --response_column"), ("response", "answers"),
    ):  # fmt: skip
        group.add_argument(f"--{kind}_column", metavar="NAME", help=f"column of {help}")
    parser.flag("whole_files", "a .txt file is one document; by default each line is", group=group)
    parser.flag("special_tokens", "text of a special token becomes its id", group=group)
    ends = parser.add_argument_group("how a row begins and ends")
    add = ends.add_argument
    add("--prompt_ids", type=command_line.ids, default=[], metavar="1", help="ids that rows begin with, such as BOS")
    add("--eos_id", type=command_line.ids, metavar="ID",
        help="id that ends a document (the tokenizer's EOS); 1,107 for a model with several")  # fmt: skip
    parser.flag("eos", "end documents with EOS (true)", group=ends, default=True)
    hub = parser.add_argument_group("data sets of the hub")
    hub.add_argument("--split", default="train", metavar="NAME", help="part of the data set (train)")
    hub.add_argument("--subset", metavar="NAME", help="its configuration (the default one)")
    return parser


def _make(args: argparse.Namespace, argv: list[str]) -> None:
    # Imported here: --help and typing errors do not wait for JAX.
    from kd_jax.lm.corpus import ingest
    from kd_jax.runs import packages

    if args.eos_id is not None and not args.eos:
        raise ValueError("--eos_id has no effect with --noeos")
    options = {name: value for name, value in vars(args).items() if name not in ("data", "out", "tokenizer", "eos_id")}
    options["eos"] = args.eos if args.eos_id is None else args.eos_id
    corpus = ingest.from_dataset(
        packages.locate(args.data), args.out, args.tokenizer, **options, command=command_line.command(argv)
    )
    counts = corpus.manifest["counts"]
    print(f"{counts['rows']} rows, {counts['tokens']} tokens, {counts['finished']} rows end with EOS")
    print(f"left out: {ingest.left_out(corpus.manifest.get('skipped'))}")
    print(f"corpus: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
