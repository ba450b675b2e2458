"""What every report page shares: its HTML frame, numbers as text, images inside the page, and where a run came from."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from matplotlib.figure import Figure

from kd_jax.reporting import charts as charts_lib
from kd_jax.reporting import figures
from kd_jax.storage import files

# A page is _HEAD, the style of its own, _BODY, its own template and _TAIL: one file that loads nothing from elsewhere.
# An empty <nav> in a template becomes the list of its headings.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #555; --line: #ddd; --rule: #888;
        --link: #2b5d8a; --shade: #eef2f6; --warn: #a32c3e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #17191c; --faint: #a4a9b0; --line: #34383d;
        --rule: #6b7178; --link: #8ab4e0; --shade: #252b33; --warn: #f08a98; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
a { color: var(--link); } nav ul { columns: 16rem; padding-left: 1.2rem; }
/* A shade at an edge means that there is more. Covers in the page's colour move with the table and hide it there. */
.scroll { overflow-x: auto; overflow-wrap: normal;
          background: linear-gradient(90deg, var(--paper) 50%, transparent),
          linear-gradient(270deg, var(--paper) 50%, transparent) right,
          linear-gradient(90deg, var(--rule), transparent), linear-gradient(270deg, var(--rule), transparent) right;
          background-repeat: no-repeat; background-size: 4rem 100%, 4rem 100%, 1rem 100%, 1rem 100%;
          background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--rule); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; } figure { margin: 1rem 0; }
.chart { width: 100%; height: 30rem; }
button { font: inherit; font-size: .88rem; margin: 0 .5rem .6rem 0; padding: .15rem .7rem; cursor: pointer; }
figcaption, footer, .note { font-size: .88rem; color: var(--faint); }
.lead { font-size: 1.1rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
"""
_BODY = """</style></head><body>
{% macro grid(head, rows) %}<div class="scroll"><table><thead><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
</thead><tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro figure(name, caption) %}{% if name in images %}<figure{% if name in charts %} data-chart="chart-{{ name }}"
{% endif %}><img alt="{{ caption }}" src="data:image/svg+xml;base64,{{ images[name] }}"><figcaption>{{ caption }}
Files: figures/{{ name }}.pdf, .svg, .png</figcaption></figure>{% if name in charts %}
<script type="application/json" id="chart-{{ name }}">{{ json(charts[name]) }}</script>
{% endif %}{% endif %}{% endmacro %}
{% macro section(table) %}<h2>{{ table.title }}</h2>
{% for text in table.texts %}<p>{{ text }}</p>
{% endfor %}{% if table.rows %}{{ grid(table.head, table.rows) }}
<p class="note">{{ table.note }} Files: figures/{{ table.name }}.csv, .tex</p>{% endif %}{% endmacro %}
<h1>{{ title }}</h1>
{% if note %}<p><strong>{{ note }}</strong></p>
{% endif %}"""
_TAIL = """<footer><h2>Reproduction</h2><dl>{% for key, value in footer %}<dt>{{ key }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl></footer>
{{ scripts }}</body></html>
"""


class Beside(NamedTuple):
    """One run's result in short, for another run's page.

    Attributes:
        title: what the run is.
        image: its frontier, an SVG in base64.
        slopes: name and value, as text, of each slope.
        note: the unit of the slopes.
    """

    title: str
    image: str
    slopes: list[tuple[str, str]]
    note: str


def render(
    template: str, *, folder: Path, style: str = "", command: str = "", charts: Mapping[str, Any] | None = None,
    interactive: bool = False, **values: Any,
) -> str:  # fmt: skip
    """A whole page from the template of its body.

    The template has the macros `grid(head, rows)`, `figure(name, caption)` and `section(table)`, the latter for a
    `kd_jax.reporting.tables.Table`. All text is escaped.

    Args:
        template: Jinja source of the body.
        folder: of the run, for the footer.
        style: CSS of this page alone.
        command: what makes the page again; by default that of the folder's report.
        charts: as `kd_jax.reporting.charts.chart` makes them, by the name of the figure whose place they take.
        interactive: whether the template has more that interactive.js shows, such as a browser of samples.
        values: what the template names; at least `title` and `images` (name -> SVG in base64); a `note`
            comes before all else.
    Returns: the page's HTML.
    """
    source = _HEAD + style + _BODY + template + _TAIL
    # Escaped: names and samples come out of runs and may hold anything.
    scripts = charts_lib.scripts(bool(charts)) if charts or interactive else ""
    html = (
        Environment(autoescape=True)
        .from_string(source)
        .render(footer=_footer(folder, command), charts=charts or {}, json=charts_lib.data, scripts=scripts, **values)
    )
    # a sample's row can hold half of a surrogate pair, which UTF-8 cannot encode
    return _with_contents(html).encode("utf-8", "replace").decode("utf-8")


def _with_contents(html: str) -> str:
    """The page with an anchor at each heading, and links to them in its empty <nav>; unchanged without one."""
    if "<nav></nav>" not in html:
        return html
    anchors: dict[str, str] = {}

    def anchored(match: re.Match) -> str:
        anchor = re.sub(r"[^a-z0-9]+", "-", unescape(match[1]).lower()).strip("-")
        anchors[anchor] = match[1]
        return f'<h2 id="{anchor}">{match[1]}</h2>'

    # A regular expression will do: headings are those of our own templates, without nesting.
    html = re.sub(r"<h2>(.*?)</h2>", anchored, html, flags=re.DOTALL)
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>\n' for anchor, title in anchors.items())
    return html.replace("<nav></nav>", f"<nav><ul>{links}</ul></nav>", 1)


def embed(drawn: dict[str, Figure], folder: Path) -> dict[str, str]:
    """Saves each figure (PDF, PNG and SVG) into the run's figures/, and returns the SVGs in base64 by name.

    Args:
        drawn: figures by name.
        folder: of the run.
    """
    images = {}
    for name, figure in drawn.items():
        # Inside the page, so that it is one file that can be sent and opened anywhere.
        images[name] = base64.b64encode(figures.save(figure, folder / "figures", name).read_bytes()).decode("ascii")
    return images


def number(value: Any) -> float:
    """A metric as a float; a missing or null one is NaN."""
    return float("nan") if value is None else float(value)


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; raises FileNotFoundError, ValueError or RunError, fit to print."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run folder: {folder}")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {folder}")
    rows = files.read_rows(path)
    if not rows:
        raise ValueError(f"metrics.jsonl in {folder} is empty")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no file; ValueError names a file that is broken."""
    return files.read_json(path, ValueError) if path.is_file() else {}


def unfinished(name: str, manifest: dict[str, Any]) -> str:
    """A sentence that a run is not finished, or may not be, by its manifest; empty for one that is.

    Args:
        name: of the run.
        manifest: {} where there is none.
    """
    if not manifest:
        return f"{name} has no manifest.json: nothing says that the run is finished."
    if manifest.get("status") == "finished":
        return ""
    return f"{name} is not finished: its numbers may change (manifest.json, status: {manifest.get('status')})."


def _footer(folder: Path, command: str) -> list[tuple[str, str]]:
    """The reproduction entries, as the manifest has them."""

    def text(value) -> str:
        return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

    manifest = read_json(folder / "manifest.json")
    # What it takes to make the run again.
    found = [(key, manifest[key]) for key in ("command", "versions", "device", "seed", "git_commit") if key in manifest]
    entries = [(key.replace("_", " "), text(value)) for key, value in found if value is not None]
    # An evaluation makes its page itself.
    if command and command == manifest.get("command"):
        return entries
    return [*entries, ("report", command or f"python -m kd_jax.report {folder}")]
