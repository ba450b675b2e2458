"""Precision, recall and more of any models against p*: one row of numbers each, with standard errors.

python -m kd_jax.evaluate --p_star SOURCE --model [NAME=]SOURCE ... --out FOLDER
python -m kd_jax.evaluate --p_star SOURCE --model [NAME=]SOURCE ... --corpus FOLDER --out FOLDER
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_jax.runs import command_line
from kd_jax.runs.command_line import mesh_sizes, number, path

# A seed that no training data is likely to have: recall of sequences that a model has learnt would be too high.
_DATA_SEED = 2**31
_COLUMNS = {
    "precision": "precision", "recall": "recall", "entropy": "entropy", "kl_model_data": "KL(model||p*)",
    "kl_data_model": "KL(p*||model)",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parse, lambda args: _run(args, argv), argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m kd_jax.evaluate",
        description="Evaluates models against p*: precision (their samples under p*), recall (samples of p* under "
        "them), entropy, KL both ways, lengths and variety. The same command resumes a run that was stopped, and "
        "repeats only what has changed.",
    )
    count = number(int, at_least=1)
    add = parser.add_argument
    add("--p_star", required=True, metavar="SOURCE", help="p*: anything that kd_jax.lm.weights.load takes")
    add(
        "--model", action="extend", nargs="+", required=True, metavar="[NAME=]SOURCE",
        help="a model and its name, by default that of its file; names ARM/seed-N are seeds of one arm",
    )  # fmt: skip
    add("--corpus", type=path, metavar="FOLDER", help="corpus that recall is measured on (default: samples of p*)")
    add("--out", type=path, default="runs/evaluation", metavar="FOLDER", help="where all results go (%(default)s)")
    add("--num_samples", type=count, default=1000, metavar="N", help="samples of each model (%(default)s)")
    add(
        "--samples_per_prompt", type=count, default=1, metavar="K",
        help="samples of each prompt, where the rows of --corpus have prompts of their own (%(default)s)",
    )  # fmt: skip
    add("--num_recall", type=count, metavar="N", help="rows for recall (all of --corpus, else as --num_samples)")
    # Below every seed of p*'s validation samples, so that no model is sampled with the same random numbers.
    add("--seed", type=number(int, at_least=0, below=_DATA_SEED), default=0, help="of the samples (%(default)s)")
    add(
        "--sample_temperature", type=number(float, at_least=0), nargs="+", default=[1.0], metavar="TAU",
        help="every model is evaluated at each of these (1)",
    )  # fmt: skip
    add("--agreement", action="store_true", help="score p* on the recall rows, for agreement with its likeliest ids")
    add(
        "--embedding_model", default="", metavar="SOURCE",
        help="adds metrics of samples as points, the mean hidden states of this model; best not p*",
    )  # fmt: skip
    command_line.add_prompt(parser)
    add("--max_length", type=number(int, at_least=2), metavar="L", help="most tokens of a sample, with prompt (512)")
    add("--batch_size", type=count, default=64, metavar="B", help="samples drawn at a time (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and products (%(default)s)")
    add("--mesh", type=mesh_sizes, metavar="data=2,tensor=4", help="sizes of the axes of the device mesh")
    command_line.add_processes(parser)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; `model` is a dict from names to sources.

    Raises: ValueError for every mistake that shows without a model.
    """
    args = _parser().parse_args(words)
    if args.corpus is not None:
        for name in ("prompt", "prompt_ids", "max_length"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} does not go with --corpus, which says what it is")
    elif args.samples_per_prompt != 1:
        raise ValueError("--samples_per_prompt goes with a --corpus whose rows have prompts of their own")
    args.model = _named(args.model)
    return args


def _named(models: Sequence[str]) -> dict[str, str]:
    named = {}
    for word in models:
        # "==" belongs to a package's version; an existing path is a path, also with "=" in it.
        match = None if Path(word).expanduser().exists() else re.fullmatch(r"([^=:]+)=(?!=)(.+)", word)
        name, source = match.groups() if match else (Path(word).expanduser().absolute().name, word)
        if match is None and word.startswith("pypi:"):
            name = word.removeprefix("pypi:").partition("==")[0]
        if name in named:
            raise ValueError(f"--model {word}: there are two models called {name}; name them, as in NAME={source}")
        named[name] = source
    return named


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    command_line.start_processes(args)
    with command_line.writing(args.out, argv):
        _evaluate(args, argv)


def _evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    # Imported here: --help and typing errors do not wait for JAX.
    from kd_jax.lm import corpus, evaluation
    from kd_jax.lm.evaluation import paired
    from kd_jax.parallel import distributed
    from kd_jax.reporting import models_page, units
    from kd_jax.runs import cache
    from kd_jax.runs.run import timestamp
    from kd_jax.storage.files import write_json, write_rows

    start, out = time.perf_counter(), Path(args.out)
    _check_folder(out)
    validation = None if args.corpus is None else corpus.open(args.corpus)
    mesh = command_line.mesh(args.mesh)
    cache.enable_compilation_cache()
    spec = evaluation.EvaluationSpec(
        num_samples=args.num_samples, samples_per_prompt=args.samples_per_prompt,
        # By default all rows of a corpus. Of p*'s own samples there may be more, left by a larger evaluation here.
        num_recall=args.num_recall or (args.num_samples if validation is None else None),
        seed=args.seed, dtype=args.dtype, sample_temperatures=tuple(args.sample_temperature),
        batch_size=args.batch_size, agreement=args.agreement, embedding_model=args.embedding_model,
    )  # fmt: skip
    entries = {name: evaluation.Entry(source, *_arm(name)) for name, source in args.model.items()}
    manifest, p_star = _manifest(args, argv), evaluation.LazyModel(args.p_star, args.dtype, mesh, out / "models")
    if validation is None:
        prompt_ids, max_length = _prompt(args, p_star.metadata)
        # before p* is sampled, which may take hours
        evaluation.check(p_star, entries, spec, max_length)
        _begin(out, manifest)
        validation = _sample_validation(args, p_star, prompt_ids, max_length, spec, mesh)
    plan = evaluation.plan(p_star, entries, validation, spec, out / "models", mesh)
    # After all checks, so that an evaluation that cannot begin leaves nothing.
    _begin(out, manifest)
    rows = evaluation.carry_out(plan)
    if not distributed.leads():
        return
    # The rows before the manifest: where it says "finished", they are there.
    write_rows(out / "metrics.jsonl", rows)
    if any(row["seed"] is not None for row in rows):
        # All models are scored on the same rows, so errors over seeds need the value of each row.
        paired.keep(out / "recall.npz", out / "models", rows, plan.data.rows)
        units.attach(rows, out)
    seconds = round(time.perf_counter() - start, 3)
    write_json(out / "manifest.json", {**manifest, "status": "finished", "finished": timestamp(), "seconds": seconds})
    _print_table(rows)
    print(f"\nrows: {out / 'metrics.jsonl'} ({seconds:.1f} s)\nreport: {models_page.write(rows, out)}")


def _begin(out: Path, manifest: dict[str, Any]) -> None:
    """Notes in the manifest that an evaluation has begun."""
    from kd_jax.parallel import distributed
    from kd_jax.storage.files import write_json

    if distributed.leads():
        write_json(out / "manifest.json", manifest)


def _arm(name: str) -> tuple[str, float | None, int | None]:
    """Arm, tau and training seed as the name has them: direct/seed-0, tau-0.8/seed-3, teacher."""
    # A command line has only names to say this with; from here on they are fields.
    arm, _, seed = name.partition("/seed-")
    seed = int(seed) if re.fullmatch("[0-9]+", seed) else None
    tau = re.fullmatch(r"tau-([0-9]+(?:\.[0-9]+)?)", arm)
    if tau:
        return "distilled", float(tau[1]), seed
    return arm if arm in ("direct", "teacher") else "model", None, seed


def _check_folder(out: Path) -> None:
    """Raises RunError for a folder that holds other things: a run's, say, whose metrics.jsonl would be replaced."""
    from kd_jax.storage import lock
    from kd_jax.storage.errors import RunError
    from kd_jax.storage.files import read_json

    # a .tmp of ours is what a kill during the very first write leaves
    there = [name for name in lock.contents(out) if name != "manifest.json.tmp"]
    if not there:
        return
    try:
        ours = read_json(out / "manifest.json").get("kind") == "evaluation"
    except (FileNotFoundError, RunError):
        ours = False
    if not ours:
        raise RunError(f"--out {out} holds something other than an evaluation ({there[0]}); choose another folder")


def _prompt(args: argparse.Namespace, p_star: Any) -> tuple[list[int], int]:
    """Prompt and longest length of p*'s own samples. Raises ValueError for a prompt or a length it cannot have."""
    # Ids are taken as they are: only a text needs a tokenizer.
    ids = args.prompt_ids
    if ids is None and p_star.tokenizer is None:
        raise ValueError(f"{args.p_star} has no tokenizer for --prompt; give the prompt as --prompt_ids")
    if ids is None:
        ids = p_star.tokenizer.encode_prompt("The" if args.prompt is None else args.prompt)
    if not ids:
        raise ValueError("the prompt is empty, and a model needs an id to start from: give --prompt or --prompt_ids")
    outside = [i for i in ids if not 0 <= i < p_star.num_tokens]
    if outside:
        raise ValueError(f"--prompt_ids: {outside[0]} is not an id of {args.p_star}, which has {p_star.num_tokens}")
    max_length = args.max_length or 512
    if max_length <= len(ids):
        raise ValueError(
            f"--max_length {max_length} counts the prompt, which has {len(ids)} ids; nothing could be added"
        )
    return ids, max_length


def _sample_validation(args, p_star, prompt_ids, max_length, spec, mesh) -> Any:
    """The corpus of p*'s own samples."""
    from kd_jax.lm import evaluation
    from kd_jax.lm.decode import WHOLE, to_corpus
    from kd_jax.lm.model import Compute
    from kd_jax.storage import files

    source = files.absolute(args.p_star)
    drawn = evaluation.sampling_settings(
        p_star, source, prompt_ids, max_length, spec.num_recall, _DATA_SEED + args.seed, WHOLE, spec
    )
    return to_corpus.sample(
        p_star.load, Path(args.out) / "p_star", drawn, command="validation samples of p*", label="p*: samples",
        batch_size=spec.batch_size, compute=Compute(dtype=spec.dtype), mesh=mesh,
    )  # fmt: skip


def _manifest(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    from kd_jax.runs.run import origin, timestamp

    ours = {"kind": "evaluation", "status": "running", "started": timestamp(), "settings": vars(args)}
    return ours | origin(command_line.command(argv))


def _print_table(rows: list[dict[str, Any]]) -> None:
    from kd_jax.reporting.models_page import label

    print("nats per token (sum over all tokens / number of tokens), with the standard error over sequences")
    _print_grid([[label(row), *(_value(row[key], row[f"{key}_se"]) for key in _COLUMNS)] for row in rows])
    for row in rows:
        if row["precision_num_infinite"]:
            print(f"{label(row)}: {row['precision_num_infinite']} of its samples have probability 0 under p*")
        if row["recall_num_infinite"]:
            print(f"{label(row)}: {row['recall_num_infinite']} validation rows have probability 0 under it")
        # Two standard errors: a warning, not a test.
        if row["precision_excess"] is not None and row["precision_excess"] > 2 * row["precision_excess_se"]:
            print(
                f"{label(row)}: its samples are likelier under p* than p*'s own, which bad text can be too: entropy "
                f"{row['entropy']:.2f}, distinct-2 {row['distinct_2']:.2f}, repetition {row['repetition_4']:.2f}"
            )
    seeds = {}
    for row in rows:
        if row["seed"] is not None:
            seeds.setdefault(label({**row, "name": row["name"].rpartition("/seed-")[0]}), []).append(row)
    # The error over seeds says more than that over sequences, but needs two seeds.
    groups = {arm: group for arm, group in seeds.items() if len(group) > 1}
    if groups:
        print("\nmean over seeds, with its standard error (of recall and KL(p*||model) over the recall rows, too)")
        _print_grid(
            [[f"{arm} ({len(group)})", *(_over_seeds(group, key) for key in _COLUMNS)] for arm, group in groups.items()]
        )


def _over_seeds(group: list[dict[str, Any]], key: str) -> str:
    from kd_jax.reporting import units

    values, students = [row[key] for row in group], [units.student(row) for row in group]
    if None in values:
        return _value(None, None)
    return _value(*units.interval(students, values, units.by_sequence(group, key))[:2])


def _value(mean: float | None, standard_error: float | None) -> str:
    return "-" if mean is None else f"{mean:.4f} ± {standard_error:.4f}"


def _print_grid(lines: list[list[str]]) -> None:
    lines = [["model", *_COLUMNS.values()], *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        print("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))


if __name__ == "__main__":
    sys.exit(main())
