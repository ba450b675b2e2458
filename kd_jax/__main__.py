"""All commands as one: kd-jax COMMAND ..., or python -m kd_jax COMMAND ..."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "run an experiment, or resume it",
    "sweep": "run an experiment for every combination of the values listed",
    "sample": "sample a corpus from a model, or show one",
    "corpus": "make a corpus of token ids from data",
    "teacher": "record a teacher's likeliest tokens with a corpus",
    "evaluate": "precision, recall and more of models against p*",
    "report": "write the pages of run folders",
    "compare": "put several runs on one page",
    "export": "write a model for Hugging Face's transformers, with a model card",
}
_USAGE = "\n".join(
    ["usage: kd-jax COMMAND [flags]; kd-jax COMMAND --help lists the flags", ""]
    + [f"  {name:10} {what}" for name, what in COMMANDS.items()]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        asked = words in (["--help"], ["-h"])
        if words and not asked:
            near = difflib.get_close_matches(words[0], COMMANDS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            print(f"error: {words[0]!r} is not a command{meant}", file=sys.stderr)
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        # the command's own file is what it takes for the program's name
        return importlib.import_module(f"kd_jax.{words[0]}").main([f"kd_jax/{words[0]}.py", *words[1:]])
    except KeyboardInterrupt:  # while it is imported
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
