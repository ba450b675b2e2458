"""What the commands share: how they end, their parser, and arguments of several of them."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax.runs import command_line
from kd_jax.runs.command_line import Parser, ids, mesh_sizes, number, path
from kd_jax.storage.errors import Absent, RunError

PRINT = """
import sys
from kd_jax.runs import command_line
def work(args):
    for i in range(100_000):
        print("1.0 ± 0.1")
sys.exit(command_line.main(lambda words: None, work, ["x"]))
"""


def end(error):
    def work(args):
        raise error

    return command_line.main(lambda words: None, work, ["x"])


@pytest.mark.parametrize("error", [ValueError("a"), RunError("a"), OSError(28, "a", "f"), FloatingPointError("a")])
def test_an_error_that_can_be_mended_is_one_line_and_code_2(error, capsys):
    assert end(error) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_other_ends(capsys):
    assert end(Absent("a")) == 75 and capsys.readouterr().err == "error: a\n"
    assert end(KeyboardInterrupt()) == 130 and "the same command resumes" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    assert command_line.main(interrupted, None, ["x"]) == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyError):  # a fault of the program keeps its traceback
        end(KeyError("a"))
    assert command_line.main(lambda words: words, lambda args: None, ["x", "y"]) == 0


@pytest.mark.slow
def test_a_closed_pipe_ends_silently_and_a_narrow_encoding_does_not_matter():
    command = [sys.executable, "-c", PRINT]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"}
    )
    assert process.stdout.readline() == b"1.0 ? 0.1\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == b""


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], (False, 3)),
        (["--on"], (True, 3)),
        (["--on=False"], (False, 3)),
        (["--on=0"], (False, 3)),
        (["--on", "--noon"], (False, 3)),
        (["--count", "7"], (False, 7)),
    ],
)
def test_flags(words, values):
    parser = Parser()
    parser.flag("on", "whether")
    parser.add_argument("--count", type=number(int, at_least=1), default=3)
    args = parser.parse_args(words)
    assert (args.on, args.count) == values


@pytest.mark.parametrize("word", ["--on=no", "--on=", "--count=0", "--count=1.5", "--count=nan", "--cout=3", "--o"])
def test_a_wrong_flag_is_named(word):
    parser = Parser()
    parser.flag("on", "whether")
    parser.add_argument("--count", type=number(int, at_least=1), default=3)
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        parser.parse_args([word])


def test_kinds_of_arguments():
    assert ids("1,504") == [1, 504] and ids("") == []
    assert mesh_sizes("data=2, tensor=4") == {"data": 2, "tensor": 4}
    assert path("~/a") == str(Path.home() / "a")
    for text in ("", " "):
        with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
            path(text)
    assert number(float, at_least=0, below=1)("0.5") == 0.5
    for text in ("-0.1", "1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(float, at_least=0, below=1)(text)
    assert command_line.mesh(None) is None
    with pytest.raises(ValueError, match="'rows' is not an axis"):
        command_line.mesh({"rows": 2})


def test_the_command_that_a_message_shows():
    assert command_line.command(["/x/kd_jax/train.py", "--config", "a b.py"]) == (
        "python -m kd_jax.train --config 'a b.py'"
    )
