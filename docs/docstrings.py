"""For mkdocstrings, which reads the source without running it, and takes docstrings for Markdown."""

import re

import griffe

from kd_jax.losses import TABLE

# "Returns: the mean." on one line, which its parser takes for prose: the label, its text, lines indented under it
_ONE_LINE = re.compile(r"^(Returns|Raises|Yields|Source): (.+(?:\n[ ]{4,}.+)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_module(self, *, mod: griffe.Module, loader: griffe.GriffeLoader, **_) -> None:
        # these functions are made from the rows of a table: their signatures and texts are known once it is imported
        if mod.path == "kd_jax.losses.divergences":
            imported = griffe.inspect(
                "divergences", parent=mod.parent, filepath=mod.filepath, docstring_parser=loader.docstring_parser,
                docstring_options=loader.docstring_options,
            )  # fmt: skip
            for name in TABLE:
                imported[name].docstring.value = _markdown(imported[name].docstring.value)
                mod.set_member(name, imported[name])

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value)


def _markdown(text: str) -> str:
    text = _ONE_LINE.sub(lambda match: f"\n**{match[1]}:** " + re.sub(r"\n +", "\n", match[2]) + "\n", text)
    # p* is no emphasis
    return re.sub(r"(?<=\bp)\*(?!\*)", r"\\*", text)
