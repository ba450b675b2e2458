"""The documentation says what the code says: settings, links, names, commands. test_docs_run.py runs its examples."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from configs import lm_paper_quick
from docs import settings
from kd_jax import __main__
from kd_jax.lm.experiment import chain
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs import command_line
from kd_jax.runs.settings import freeze

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "launch/README.md", ROOT / "tpu_scripts/README.md"]
)
# examples that say why nothing runs them here; a new one is counted here
NOT_RUN = 11
_FENCE = re.compile(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="(.+)"')


class Block(NamedTuple):
    """A fenced example of a page.

    Attributes:
        page: the file.
        language: bash or python; others are only shown.
        note: what the info string says after it: a title, or why it is not run.
        text: the example.
    """

    page: Path
    language: str
    note: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.note.startswith("no-run")

    @property
    def file(self) -> str:
        """The name of the file that the example is; empty for one that is run as it stands."""
        match = _TITLE.search(self.note)
        return match[1] if match else ""


def blocks(page: Path) -> list[Block]:
    return [Block(page, *(part or "" for part in match)) for match in _FENCE.findall(page.read_text())]


def commands(block: Block) -> list[list[str]]:
    """The words of each kd-jax command of an example."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"kd-jax |python -m kd_jax\.", line)]


def test_settings_are_those_of_the_declarations():
    path = ROOT / "docs" / "settings.md"
    assert path.read_text() == settings.page(), "python -m docs.settings writes it again"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_flags_and_configs_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # only the parsing of each command: it checks flags, settings, types and ranges, and loads the config
    monkeypatch.setattr(command_line, "main", lambda parse, _, argv: parse(argv[1:]))
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")
        if block.file:
            Path(block.file).write_text(block.text)
        for words in commands(block):
            name, *flags = words[1:] if words[0] == "kd-jax" else [words[2].removeprefix("kd_jax."), *words[3:]]
            assert name in __main__.COMMANDS, words
            if "--help" not in flags:
                importlib.import_module(f"kd_jax.{name}").main([name, *flags])


def test_examples_that_do_not_run_are_few_and_say_why():
    skipped = [block for page in PAGES for block in blocks(page) if block.note.startswith("no-run")]
    assert len(skipped) == NOT_RUN, [(block.page.name, block.note) for block in skipped]
    assert all(re.fullmatch("no-run: .+", block.note) for block in skipped)


def test_public_names_have_a_place_in_the_api_pages():
    shown = {
        name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
    }
    whole = (
        "fused",
        "metrics",
        "gmm.mixture",
        "gmm.em",
        "lm.weights",
        "lm.score",
        "lm.decode",
        "lm.corpus",
        "lm.model",
    )
    assert {f"kd_jax.{module}" for module in whole} <= shown
    # the losses are named one by one, in groups
    losses = (ROOT / "docs/api/losses.md").read_text()
    assert not [name for name in importlib.import_module("kd_jax.losses").__all__ if name not in losses]


@pytest.mark.parametrize("page", ["docs/clusters.md", "launch/README.md"])
def test_chains_of_jobs_run_every_stage(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    (words,) = re.findall(r"slurm/submit\.sh ([^\n]* evaluation) +-- +--config lm_paper_quick", text)
    spec = freeze(LmSpec, lm_paper_quick.get_config())
    asked = {name for word in words.split() if not word.startswith("--") for name in word.split(",")}
    assert asked == {stage.group for stage in chain.plan(spec, "p*")} | {"evaluation"}
