"""Samples a corpus of token ids from a model, or shows one that is there.

python -m kd_jax.sample --model SOURCE --num_samples N --sample_temperature 0.8 --out FOLDER
python -m kd_jax.sample --model SOURCE --prompts FILE --samples_per_prompt 4 --out FOLDER
python -m kd_jax.sample --read FOLDER
"""

import argparse
import collections
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.runs import command_line
from kd_jax.runs.command_line import mesh_sizes, number, path
from kd_jax.storage import files

_KNOBS = dataclasses.fields(SamplerSpec)
# Defaults of the flags, for sampling and for reading. A flag of the other group is refused.
_SAMPLING = {
    "model": None, "num_samples": None, "out": None, **{knob.name: knob.default for knob in _KNOBS}, "seed": 0,
    "prompt": None, "prompt_ids": None, "prompts": None, "prompts_column": None, "samples_per_prompt": 1,
    "bos": False, "max_length": None, "max_new_tokens": None, "batch_size": 64, "shard_size": 1024,
    "dtype": "float32", "mesh": None, "record_top_k": None, "log_prob_format": "uint16", **command_line.PROCESSES,
}  # fmt: skip
_READING = {"read": None, "model": None, "num_samples": 5, "first": 0, "text_out": None, **command_line.PROCESSES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parse, lambda args: _run(args, argv), argv)


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    if "read" in args:
        _read(args)
        return
    command_line.start_processes(args)
    with command_line.writing(args.out, argv):
        _sample(args, argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m kd_jax.sample",
        description="Samples a corpus of token ids from a model (--model, --num_samples, --out), or shows one "
        "(--read). The same command resumes a run that was stopped; a larger --num_samples adds to a finished corpus.",
        # Only flags that are given become attributes, so that one of the other group can be refused.
        argument_default=argparse.SUPPRESS,
    )
    count = number(int, at_least=1)
    add = parser.add_argument
    add("--model", metavar="SOURCE", help="what to sample from: anything that kd_jax.lm.weights.load takes")
    add("--num_samples", type=count, metavar="N", help="how many samples; with --read how many to show (5)")
    add("--out", type=path, metavar="FOLDER", help="folder of the corpus")
    for knob in _KNOBS:
        add(f"--{knob.name}", type=type(knob.default), help=f"{knob.metadata['meaning']} ({knob.default})")
    add("--seed", type=number(int, at_least=0, below=2**32), help="sample i is a function of the seed and i (0)")
    command_line.add_prompt(parser)
    add("--prompts", type=path, metavar="FILE", help="several prompts: a column of texts, or of conversations, "
        "which the model's chat template renders; a file or folder of Parquet, JSON, CSV or text")  # fmt: skip
    add("--prompts_column", metavar="NAME", help="column of the prompts (messages, else prompt, instruction or text)")
    add("--samples_per_prompt", type=count, metavar="K", help="consecutive samples of each of --prompts (1)")
    add("--bos", action="store_true", help="begin the prompt with the model's BOS id, whatever its tokenizer does")
    length = parser.add_mutually_exclusive_group().add_argument
    length("--max_length", type=number(int, at_least=2), metavar="L", help="most tokens of a sample, with prompt (512)")
    length("--max_new_tokens", type=count, metavar="L", help="most tokens of a sample after its prompt")
    add("--batch_size", type=count, metavar="B", help="samples drawn at a time (64)")
    add("--shard_size", type=count, metavar="ROWS", help="samples in one file (1024)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and products (float32)")
    add("--record_top_k", type=count, metavar="K", help="also record the model's K likeliest ids at each position")
    add("--log_prob_format", choices=("uint16", "float32"), help="of recorded values: rounded, or exact (uint16)")
    add("--mesh", type=mesh_sizes, metavar="data=2,tensor=4", help="sizes of the axes of the device mesh")
    add("--read", type=path, metavar="FOLDER", help="show samples of this corpus, decoded")
    add("--first", type=number(int, at_least=0), metavar="I", help="first sample to show (0)")
    add("--text_out", type=path, metavar="FILE.jsonl", help="write the shown samples there, one JSON object a line")
    command_line.add_processes(parser)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments with the defaults of what is asked for, sampling or reading.

    Raises: ValueError for every mistake that shows without a model.
    """
    given = vars(_parser().parse_args(words))
    known, asked = (_READING, "--read") if "read" in given else (_SAMPLING, "sampling (only with --read)")
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} does not go with {asked}")
    if "log_prob_format" in given and "record_top_k" not in given:
        raise ValueError("--log_prob_format goes with --record_top_k")
    args = argparse.Namespace(**{**known, **given})
    if "read" not in given:
        _check_sampling(args)
    return args


def _check_sampling(args: argparse.Namespace) -> None:
    if args.prompts is None and (args.prompts_column or args.samples_per_prompt != 1):
        raise ValueError("--prompts_column and --samples_per_prompt go with --prompts")
    if args.prompts is not None:
        for name in ("prompt", "prompt_ids", "bos", "num_samples"):
            if getattr(args, name):
                raise ValueError(f"--{name} does not go with --prompts (each has --samples_per_prompt samples)")
    for name in ("model", "out") if args.prompts is not None else ("model", "num_samples", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing (or --read, to show a corpus)")
    try:
        _sampler(args)
    except ValueError as error:
        # The spec's error begins with the setting's name, which is also the flag's.
        raise ValueError(f"--{error}") from error
    # The paper's prompt.
    if args.prompt is None and args.prompt_ids is None and args.prompts is None:
        args.prompt = "The"
    if not args.prompt and not args.prompt_ids and not args.bos and args.prompts is None:
        raise ValueError("the prompt is empty, and a model needs an id to start from: give --bos or another prompt")
    if args.max_length is None and args.max_new_tokens is None:
        args.max_length = 512
    # A text's length is known only with the tokenizer.
    if args.prompt_ids is not None and not args.bos:
        _check_length(args, args.prompt_ids)


def _sampler(args: argparse.Namespace) -> SamplerSpec:
    return SamplerSpec.of(vars(args))


def _check_length(args: argparse.Namespace, prompt_ids: list[int]) -> None:
    if args.max_length is not None and args.max_length <= len(prompt_ids):
        raise ValueError(f"--max_length {args.max_length} includes the prompt, which has {len(prompt_ids)} ids")


def _sample(args: argparse.Namespace, argv: list[str]) -> None:
    from kd_jax.lm import corpus, decode, weights
    from kd_jax.lm.distill import recorded_top_k
    from kd_jax.lm.model import Compute, unstack
    from kd_jax.parallel import distributed
    from kd_jax.runs import cache, progress

    # A folder that cannot take these samples is an error before the weights are loaded.
    settings = _early_settings(args)
    corpus.find(args.out, settings)
    if args.record_top_k is not None and distributed.several():
        raise ValueError("--record_top_k is for one process; with several, run kd_jax.teacher on the finished corpus")
    mesh, compute = command_line.mesh(args.mesh), Compute(dtype=args.dtype)
    cache.enable_compilation_cache()
    with _count_programs() as programs:
        model = weights.load(args.model, dtype=args.dtype, mesh=mesh)
        prompts = None if args.prompts is None else _prompts(args, model)
        settings |= _model_settings(args, model, weights, prompts)
        num_samples, record = settings["num_samples"], None
        if args.record_top_k is not None:
            k, form = args.record_top_k, args.log_prob_format
            settings["teacher"] = recorded_top_k.settings(model, settings["source"], k, form, args.dtype, None)
            record = recorded_top_k.recorder(model, settings["teacher"], compute=compute, mesh=mesh)

        rows = corpus.open_for_all(args.out, settings, command=command_line.command(argv))
        if distributed.leads() and (rows.finished or rows.num_rows):
            left = "nothing left to do" if rows.finished else "resuming"
            print(f"{args.out}: {rows.num_rows} of {num_samples} samples are there, {left}")
        if not rows.finished:
            each = {} if prompts is None else {"samples_per_prompt": args.samples_per_prompt}
            each |= {"max_new_tokens": settings.get("max_new_tokens")}
            if record is None and mesh is None:  # nothing but sampling reads the weights
                model = model._replace(params=unstack(model.params, delete=True))
            stream = decode.stream(
                model, prompts or settings["prompt_ids"], num_samples, max_length=settings["max_length"],
                sampler=_sampler(args), seed=args.seed, first=rows.num_rows, batch_size=args.batch_size,
                compute=compute, mesh=mesh, **each,
            )  # fmt: skip
            with progress.sampling_bar("samples", rows.num_rows, num_samples) as report:
                if distributed.leads():
                    rows = corpus.write(rows, stream, report, record)
                else:
                    collections.deque(stream, maxlen=0)  # every process samples, process 0 writes
    if distributed.leads():
        _print_summary(rows, programs)


def _early_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the corpus that are known before the model is loaded."""
    settings = {
        "source": files.absolute(args.model),
        **{name: getattr(args, name) for name in ("dtype", "prompt", "seed", "shard_size")},
        **_sampler(args).knobs(),
    }
    if args.num_samples is not None:
        settings["num_samples"] = args.num_samples
    if args.max_length is not None:
        settings["max_length"] = args.max_length
    return settings


def _prompts(args: argparse.Namespace, model: Any) -> list[list[int]]:
    from kd_jax.lm.corpus import prompt_files

    if model.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer for --prompts")
    return prompt_files.read(args.prompts, model.tokenizer, args.prompts_column)


def _model_settings(
    args: argparse.Namespace, model: Any, weights: Any, prompts: list[list[int]] | None
) -> dict[str, Any]:
    """The settings that come from the model. Raises ValueError for a prompt or a length that it cannot take."""
    from kd_jax.lm.corpus import prompt_files

    if prompts is None:
        longest = _prompt_ids(args, model)
        given = {"prompt_ids": longest}
    else:
        longest, each = max(prompts, key=len), args.samples_per_prompt
        given = prompt_files.settings(prompts, each) | {"num_samples": each * len(prompts)}
    _check_length(args, longest)
    max_length = args.max_length or len(longest) + args.max_new_tokens
    if args.max_new_tokens and len({len(ids) for ids in prompts or ()}) > 1:
        given["max_new_tokens"] = args.max_new_tokens
    # Rotary phases beyond the positions of training are nothing that the model has learnt.
    limit = model.architecture.max_position_embeddings
    if max_length > limit:
        flag = "--max_length" if args.max_length else "--max_new_tokens"
        raise ValueError(f"{flag}: samples of up to {max_length} ids, but the model has {limit} positions")
    return {
        "model_fingerprint": weights.fingerprint(model.params),
        "tokenizer_fingerprint": None if model.tokenizer is None else model.tokenizer.fingerprint,
        **given,
        "eos_ids": sorted(model.eos_ids),
        "max_length": max_length,
    }


def _prompt_ids(args: argparse.Namespace, model: Any) -> list[int]:
    ids = args.prompt_ids
    if ids is None and model.tokenizer is None and args.prompt:
        raise ValueError(f"{args.model} has no tokenizer for --prompt; give the prompt as --prompt_ids")
    if ids is None:
        ids = model.tokenizer.encode_prompt(args.prompt) if args.prompt else []
    if args.bos and model.bos_id is None:
        raise ValueError(f"--bos: {args.model} has no BOS id")
    # Not twice: a tokenizer or the user may have put it there.
    if args.bos and ids[:1] != [model.bos_id]:
        ids = [model.bos_id, *ids]
    if not ids:
        raise ValueError(f"--prompt {args.prompt!r} gives no tokens; give --bos or another prompt")
    beyond = [i for i in ids if not 0 <= i < model.num_tokens]
    if beyond:
        raise ValueError(f"--prompt_ids: {beyond[0]} is not an id of {args.model}, which has {model.num_tokens}")
    return ids


@contextlib.contextmanager
def _count_programs() -> Iterator[collections.Counter]:
    """Counts what JAX reports of its compilation cache, by the event's name, while the block runs."""
    import jax

    counts = collections.Counter()

    def count(event: str, **_) -> None:
        counts[event] += 1

    jax.monitoring.register_event_listener(count)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(count)


def _print_summary(held: Any, programs: collections.Counter) -> None:
    counts, speed = held.manifest["counts"], held.manifest["speed"]
    rows, tokens = counts["rows"], counts["tokens"]
    print(f"{rows} samples, {tokens} tokens: mean length {tokens / rows:.1f}, {counts['finished'] / rows:.1%} finished")
    print(f"{speed['tokens_per_second']:.0f} tokens/s, utilisation {speed['utilisation']:.1%}")
    compiled, cached = (programs[f"/jax/compilation_cache/cache_{name}"] for name in ("misses", "hits"))
    print(f"programs: {compiled} compiled, {cached} from the cache")
    print(f"corpus: {held.folder}")
    print(f"read it: python -m kd_jax.sample --read {shlex.quote(str(held.folder))}")


def _read(args: argparse.Namespace) -> None:
    from kd_jax.lm.corpus import show

    show.samples(args.read, model=args.model, first=args.first, num_samples=args.num_samples, text_out=args.text_out)


if __name__ == "__main__":
    sys.exit(main())
