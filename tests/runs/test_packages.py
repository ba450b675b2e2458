"""Data out of packages: fetched once and verified; texts a sentence a line, conversations a line each."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from kd_jax.lm.corpus import documents
from kd_jax.runs import cache, packages
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
    monkeypatch.setitem(packages.PACKAGES, "npm:texts==1", packages.Texts(path.as_uri(), sha256, "CC0"))
    return path


def test_a_sentence_a_line_and_fetched_once(archive):
    path = packages.locate("npm:texts==1")
    assert open(path, encoding="utf-8").read().splitlines() == SENTENCES
    archive.unlink()
    assert packages.locate("npm:texts==1") == path
    assert documents.identity("npm:texts==1") == packages.PACKAGES["npm:texts==1"].sha256


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


def test_conversations_of_a_wheel(tmp_path, monkeypatch):
    made = tmp_path / "talk-1-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("talk/data/english/b.yml", "conversations:\n- - Who?\n  - Me.\n  - And who?\n")
        wheel.writestr("talk/data/english/a.yml", "categories:\n- x\nconversations:\n- - 'Is 1 < 2?'\n  - 'Yes: é'\n")
        wheel.writestr("talk/data/dutch/a.yml", "conversations:\n- - Wie?\n  - Ik.\n")

    def run(command, **_):
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(parents=True)
        (target / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    expected = [["Is 1 < 2?", "Yes: é"], ["Who?", "Me.", "And who?"]]
    content = packages._english(made)
    rows = packages.Rows("talk.jsonl", len(content), hashlib.sha256(content).hexdigest(), "BSD", make=packages._english)
    monkeypatch.setattr(cache.subprocess, "run", run)
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(packages.PACKAGES, "pypi:talk==1", rows)
    path = packages.locate("pypi:talk==1")
    found = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    assert [[turn["content"] for turn in talk] for talk in found] == expected
    assert [turn["role"] for turn in found[1]] == ["user", "assistant", "user"]
    made.unlink()
    assert packages.locate("pypi:talk==1") == path and documents.identity("pypi:talk==1") == rows.sha256
