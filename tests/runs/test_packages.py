"""Texts out of a package: fetched once, verified, a sentence a line."""

import hashlib
import io
import tarfile

import pytest

from kd_jax.lm.experiment.corpora import data_identity
from kd_jax.runs import packages
from kd_jax.runs.packages import Package
from kd_jax.storage.errors import RunError

TEXTS = {
    "package/data/1790.txt": "Fellow citizens of the U. S. and others: I  embrace you.\nAre we well? We are. So be it!",
    "package/data/1791.txt": 'He said: "We must." Then he left.',
    "package/README.md": "Not a text.",
}
SENTENCES = [
    "Fellow citizens of the U. S. and others: I embrace you.", "Are we well?", "We are.", "So be it!",
    'He said: "We must.', "Then he left.",
]  # fmt: skip


@pytest.fixture
def archive(tmp_path, monkeypatch):
    path = tmp_path / "texts.tgz"
    with tarfile.open(path, "w:gz") as members:
        for name, text in TEXTS.items():
            about = tarfile.TarInfo(name)
            about.size = len(text.encode())
            members.addfile(about, io.BytesIO(text.encode()))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(packages.PACKAGES, "npm:texts==1", Package(path.as_uri(), sha256, "CC0"))
    return path


def test_a_sentence_a_line_and_fetched_once(archive):
    path = packages.locate("npm:texts==1")
    assert open(path, encoding="utf-8").read().splitlines() == SENTENCES
    archive.unlink()
    assert packages.locate("npm:texts==1") == path
    assert data_identity("npm:texts==1") == packages.PACKAGES["npm:texts==1"].sha256


def test_another_content_is_refused(archive, monkeypatch):
    other = packages.PACKAGES["npm:texts==1"]._replace(sha256="0" * 64)
    monkeypatch.setitem(packages.PACKAGES, "npm:texts==1", other)
    with pytest.raises(RunError, match="has SHA-256"):
        packages.locate("npm:texts==1")
    with pytest.raises(ValueError, match="'npm:other==1' is not known"):
        packages.locate("npm:other==1")


def test_other_sources_are_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    assert packages.locate(str(tmp_path / "a.txt")) == str(tmp_path / "a.txt")
