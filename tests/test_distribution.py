"""The sdist and the wheel: built, complete, described, and installed into an environment of their own."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_they_hold_the_package_its_configs_and_nothing_else(built):
    sdist, wheel = built
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("kd_jax/**/*.py")} | {"kd_jax/py.typed"}
    configs = {f"kd_jax/shipped/configs/{path.name}" for path in ROOT.glob("configs/*.py")}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # what pages have inside them
    reporting = ROOT / "kd_jax/reporting"
    pages = {str(path.relative_to(ROOT)) for path in (*reporting.glob("*.js"), *reporting.glob("vendor/*"))}
    assert inside == modules | configs | pages
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.py"} <= names


def test_the_metadata_is_complete_and_the_readme_renders(built):
    from readme_renderer import markdown

    archive = zipfile.ZipFile(built[1])
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    for field in ("Summary", "Keywords", "License-Expression", "Project-URL", "Requires-Python", "Classifier"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"cuda", "tpu"} == set(metadata.get_all("Provides-Extra"))
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist")}
    assert {"jax", "numpy", "flax"} <= required
    page = markdown.render(archive.read(name).decode().partition("\n\n")[2])
    assert page and "<table>" in page


def test_the_wheel_works_from_any_folder(built, tmp_path):
    """Without its dependencies, which the environment of these tests lends."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, kd_jax = tmp_path / "venv/bin/python", tmp_path / "venv/bin/kd-jax"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", built[1]], check=True, timeout=300)
    (site,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    (site / "lent.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")

    def run(*words: str) -> str:
        done = subprocess.run([kd_jax, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "evaluate" in run("--help")
    assert "--config.seeds" in run("train", "--config", "gmm", "--help")
    run("train", "--config", "gmm:smoke", "--workdir", "run")
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_it_installs_with_its_dependencies_on_other_pythons(built, tmp_path, version):
    # what a version manager has on PATH may be a script that refuses to run
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}*/bin/python")]
    runs = [p for p in candidates if p and not subprocess.run([p, "-c", ""], capture_output=True).returncode]
    if not runs:
        pytest.skip(f"no Python {version} here")
    python = tmp_path / "venv/bin/python"
    for words in (
        [runs[0], "-m", "venv", "--without-pip", tmp_path / "venv"],
        [sys.executable, "-m", "uv", "pip", "install", "--system-certs", "--python", python, built[1]],
        [python.with_name("kd-jax"), "train", "--config", "gmm:smoke", "--workdir", tmp_path / "run"],
    ):
        # Python shows no such warnings by itself; those of other packages are theirs to mend
        shown = {**os.environ, "PYTHONWARNINGS": "default"}
        done = subprocess.run(words, cwd=tmp_path, env=shown, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert not re.search(r"/kd_jax/\S+: \w*DeprecationWarning", done.stderr)
    assert (tmp_path / "run/report.html").exists()
