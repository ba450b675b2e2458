"""A model as a folder that Hugging Face's transformers loads: `kd-jax export RUN_OR_CHECKPOINT FOLDER`.

    kd-jax export runs/laptop exported --student tau-0.8/seed-0      a model that a run trained
    kd-jax export runs/sft/checkpoints/500 exported                  any model that kd_jax loads
    kd-jax export runs/laptop exported --student teacher --push user/name

The folder also gets a model card, README.md: data, teacher, settings, results and citation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_jax.runs import command_line
from kd_jax.storage import errors, files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parser().parse_args, _export, argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m kd_jax.export", description=__doc__)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run folder, or what kd_jax.lm.weights.load takes")
    add("folder", type=command_line.path, metavar="FOLDER", help="where it is written")
    add("--student", metavar="NAME", help="which of a run's models, such as tau-0.8/seed-0 or teacher")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (float32)")
    parser.flag("overwrite", "replace an export that is in the folder")
    add("--push", metavar="USER/NAME", help="also upload it to the Hugging Face hub, with your token")
    parser.flag("private", "with --push, make the repository private")
    return parser


def _export(args: argparse.Namespace) -> None:
    # Imported here: --help and typing errors do not wait for JAX.
    from kd_jax.lm import weights
    from kd_jax.reporting import model_card

    if args.private and not args.push:
        raise ValueError("--private has no effect without --push")
    source, card = _model(args.source, args.student)
    # All that can fail is looked at before the weights are loaded.
    model = weights.describe(source)
    weights.check_export(model, args.folder, overwrite=args.overwrite)
    hub = _hub(args.push) if args.push else None
    weights.export(weights.load(source, dtype=args.dtype), args.folder, overwrite=args.overwrite)
    text = model_card.write(card, where=args.push or args.folder, tokenizer=model.tokenizer is not None)
    files.write_text(Path(args.folder) / "README.md", text)
    print(f"model: {args.folder} ({model.architecture.num_parameters:,} parameters, {args.dtype})")
    if hub is not None:
        _push(hub, args.push, args.folder, private=args.private)
        print(f"pushed: https://huggingface.co/{args.push}")


def _model(source: str, student: str | None) -> tuple[str, Any]:
    """What to load, and what its card says. Raises ValueError, FileNotFoundError or RunError."""
    from kd_jax.lm.report import about_run
    from kd_jax.reporting import page
    from kd_jax.reporting.model_card import Card

    folder = Path(source).expanduser()
    # A folder of transformers has a config.json too, which names no experiment.
    kind = page.read_json(folder / "config.json").get("experiment") if folder.is_dir() else None
    if kind is not None and kind != "lm":
        raise ValueError(f"{source} is a run of {kind}; only language models can be exported")
    if kind == "lm":
        # Without a name the error lists those there are.
        exported = about_run.exported(folder, student or "")
        return exported.source, exported.card
    if student:
        raise ValueError(f"--student is for a run folder, and {source} is none")
    stage = page.read_json(folder / "stage.json") if folder.is_dir() else {}
    summary = f"A copy of `{source}`, written with kd_jax for Hugging Face's transformers."
    return source, Card(folder.name or source, summary, settings=stage.get("settings") or {})


def _hub(repository: str) -> Any:
    """The hub, once it has taken the token; before any work. Raises ValueError or RunError."""
    import huggingface_hub
    from huggingface_hub import utils

    utils.validate_repo_id(repository)
    if repository.count("/") != 1:
        raise ValueError(f"--push {repository}: a repository is named user/name")
    hub = huggingface_hub.HfApi()
    _ask(hub.whoami)
    return hub


def _push(hub: Any, repository: str, folder: str, *, private: bool) -> None:
    _ask(hub.create_repo, repository, private=private, exist_ok=True)
    _ask(hub.upload_folder, repo_id=repository, folder_path=folder, commit_message="Model exported with kd_jax")


def _ask(call: Any, *args: Any, **options: Any) -> None:
    import httpx

    try:
        call(*args, **options)
    except (OSError, httpx.HTTPError) as error:  # the hub's own errors are OSErrors
        reason = " ".join(str(error).split())
        raise errors.RunError(
            f"the Hugging Face hub: {reason} (log in with `hf auth login`, or set HF_TOKEN)"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
