"""Puts the site's pages into build/docs, from which zensical builds the site: python -m docs.pages.

The pages of docs/ can be read on GitHub as they are. For the site, files outside docs/ join them (OUTSIDE), links to
these are changed, and "no-run: ..." after a fence's language, which is for tests/test_docs.py, is removed.
"""

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
# files of the repository that are pages of the site
OUTSIDE = {
    "launch/README.md": "launchers.md",
    "tpu_scripts/README.md": "tpu_vms.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
FENCE = re.compile(r"^(```\w+) (?:no-run.*|(title=.*))$", re.MULTILINE)


def page(source: str, target: str) -> str:
    """A page as the generator takes it.

    Args:
        source: path of the Markdown file in the repository.
        target: path of the page in the site.
    """

    def link(match: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        to = OUTSIDE.get(file, file.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(target) or '.')}"

    text = FENCE.sub(lambda match: f"{match[1]} {match[2] or ''}".rstrip(), (ROOT / source).read_text())
    return LINK.sub(link, text)


def write(folder: Path) -> None:
    """Writes all pages and their figures into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    inside = {f"docs/{path.relative_to(folder)}": str(path.relative_to(folder)) for path in folder.rglob("*.md")}
    for source, target in (inside | OUTSIDE).items():
        (folder / target).write_text(page(source, target))


if __name__ == "__main__":
    write(ROOT / "build" / "docs")
