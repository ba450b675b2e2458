"""The documentation says what the code says."""

import re
from pathlib import Path

from docs import settings

ROOT = Path(__file__).parents[1]


def test_settings_are_those_of_the_declarations():
    path = ROOT / "docs" / "settings.md"
    assert path.read_text() == settings.page(), "python -m docs.settings writes it again"


def test_links_lead_somewhere():
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("launch/*.md"),
        *ROOT.glob("tpu_scripts/*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200
