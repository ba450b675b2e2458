"""Run folders of others and the pages that are made of them: what is fuzzed, and what a page may hold."""

import base64
import json
from html.parser import HTMLParser
from importlib import resources

from kd_jax import report
from kd_jax.storage import files
from tests.gmm import test_frontier as gmm_frontier
from tests.gmm.report import test_page as gmm
from tests.lm.report import test_frontier as lm_frontier
from tests.lm.report import test_page as lm

TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "strong", "div", "span",
    "table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "footer", "dl", "dt", "dd", "details",
    "summary", "nav", "a", "script", "label", "select", "input", "ol",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "class", "alt", "src", "id", "href", "type", "hidden", "checked",
    "data-chart", "data-rows",
}  # fmt: skip
OWN_SCRIPTS = [
    resources.files("kd_jax.reporting").joinpath(name).read_text("utf-8")
    for name in ("vendor/echarts.common.min.js", "interactive.js")
]
OUTPUT = {"report.html", "figures"}


class Page(HTMLParser):
    """What is wrong with a page: tags, attributes and addresses that no template of ours has."""

    def __init__(self, text):
        super().__init__()
        self.wrong, self.styles, self.script = [], 0, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        if tag not in TAGS or not set(names) <= ATTRIBUTES:
            self.wrong.append(f"<{tag} {' '.join(names)}>"[:200])
        self.styles += tag == "style"
        if tag == "script":
            self.script, self.is_data = "", dict(attributes).get("type") == "application/json"
            if names and not (self.is_data and names == ["type", "id"]):
                self.wrong.append(f"<script {names}>"[:200])
        if not dict(attributes).get("href", "#").startswith("#"):
            self.wrong.append("a link to another page")
        if tag == "img":
            kind, _, data = dict(attributes)["src"].partition("base64,")
            if kind != "data:image/svg+xml;" or not base64.b64decode(data).startswith(b"<?xml"):
                self.wrong.append(f"an image from {kind[:99]}")

    def handle_data(self, data):
        if self.script is not None:
            self.script += data

    def handle_endtag(self, tag):
        if tag == "script":
            # what runs is our own files; what comes from a run is data
            if self.is_data:
                json.loads(self.script)
            elif self.script not in OWN_SCRIPTS:
                self.wrong.append(f"a script: {self.script[:99]}")
            self.script = None

    def handle_comment(self, data):
        self.wrong.append(f"<!--{data[:99]}")


def check(written, folder):
    """A page that is only ours, in a folder with nothing else that is new."""
    assert written == folder / "report.html"
    text = written.read_bytes().decode("utf-8")
    page = Page(text)
    assert page.wrong == [] and page.styles == 1, page.wrong[:3]
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>") and text.count("</html>") == 1
    endings = {path.name.partition(".")[2] for path in folder.glob("figures/*")}
    assert endings <= {"png", "pdf", "svg", "csv", "tex"}, endings


def undrawn(drawn, folder):
    """Stands in for kd_jax.reporting.page.embed: figures that are not saved, which takes most of a page's time."""
    return dict.fromkeys(drawn, base64.b64encode(b"<?xml").decode())


def load(folder):
    return report.write(folder)


def build_mixtures(folder):
    rows = gmm.make_rows(seeds=2, betas=(1.0, 10.0)) + gmm.make_rows(seeds=1, betas=(1.0, 10.0), num_data=400)
    gmm.make_run(folder, rows, with_panels=False)
    gmm.make_panels(folder / "checkpoints" / "panels.npz")


def build_mixture_frontier(folder):
    folder.rmdir()
    gmm_frontier.make_run(folder, seeds=2)


def build_language_models(folder):
    rows = lm.make_rows(seeds=2, taus=(0.8, 1.0))
    # of the losses a few
    lm.make_run(folder, [row for row in rows if row.get("step", 0) % 80 == 0], lm.make_samples(2, (0.8, 1.0), 2))
    whole = json.loads((folder / "manifest.json").read_text())
    more = {
        "seed": 0, "stages": [{"kind": "stage", "name": "corpus", "seconds": 2.5, "tokens": 100}],
        "overhead": {"data": 0.5, "total": 2.0, "share": 0.25}, "seconds": {"total": 3.5, "compile": None},
        "config_differences": {"teacher.layers": [2, 4]},
    }  # fmt: skip
    files.write_json(folder / "manifest.json", whole | more)


def build_knobs(folder):
    folder.rmdir()
    lm_frontier.make_run(folder, [row for row in lm_frontier.make_rows() if (row["seed"] or 0) < 2])
