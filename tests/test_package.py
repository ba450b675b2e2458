"""The package as it is installed: the command with its subcommands, configs by name, names that load lazily."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from kd_jax import __main__

ROOT = Path(__file__).parent.parent


def test_no_command_and_an_unknown_one_list_the_commands(capsys):
    assert __main__.main([]) == 2 and __main__.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert all(said.count(f"  {name} ") >= 2 for name in __main__.COMMANDS)
    assert __main__.main(["--help"]) == 0 and "evaluate" in capsys.readouterr().out


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([name, "--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_names_of_the_package_load_when_they_are_used():
    script = "import sys, kd_jax; assert 'jax' not in sys.modules; kd_jax.losses.forward_kl; kd_jax.metrics.Mean"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    import kd_jax

    with pytest.raises(AttributeError, match="no attribute 'loses'"):
        kd_jax.loses  # noqa: B018
    assert {"losses", "lm", "gmm"} <= set(dir(kd_jax))


@pytest.mark.slow
def test_the_installed_package_works_from_any_folder(tmp_path):
    """Without its dependencies, which the environment of these tests lends."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", str(ROOT)]
    subprocess.run(install, check=True, timeout=300)
    (site,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "lent.pth").write_text(lent + "\n")
    assert (site / "kd_jax/py.typed").exists() and (site / "kd_jax/shipped/configs/lm_laptop.py").exists()
    command = [tmp_path / "venv/bin/kd-jax", "train", "--config", "gmm:smoke", "--workdir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "run/report.html").exists(), done.stderr
    listed = subprocess.run([*command[:4], "gmm", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "--config.seeds" in listed.stdout
