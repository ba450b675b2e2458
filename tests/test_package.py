"""The package as it is installed: the command with its subcommands, configs by name, names that load lazily."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax import __main__

ROOT = Path(__file__).parent.parent


def test_no_command_and_an_unknown_one_list_the_commands(capsys):
    assert __main__.main([]) == 2 and __main__.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert all(said.count(f"  {name} ") >= 2 for name in __main__.COMMANDS)
    assert __main__.main(["--help"]) == 0 and "evaluate" in capsys.readouterr().out


def test_a_word_that_is_no_command_and_an_early_interrupt(capsys, monkeypatch):
    assert __main__.main(["trian"]) == 2
    assert "error: 'trian' is not a command; did you mean train?" in capsys.readouterr().err

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", interrupted)
    assert __main__.main(["train"]) == 130 and capsys.readouterr().err == "interrupted\n"


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
