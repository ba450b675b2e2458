"""Pages in a real browser: charts that show what is under the pointer, and the browser of samples.

Chromium has to be installed (Debian: apt install chromium); without it these tests are skipped.
"""

import json
import re
import shutil

import numpy as np
import pytest

from kd_jax import compare
from kd_jax.gmm.report import frontier as knob_page
from kd_jax.gmm.report import page as gmm_page
from kd_jax.lm.report import page as lm_page
from kd_jax.reporting import charts
from tests.gmm import test_frontier as knob_pages
from tests.gmm.report import test_page as gmm_pages
from tests.lm.report import test_page as lm_pages

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("pages"), lm_pages.make_rows()
    samples = lm_pages.make_samples()
    for row in samples:
        row["pieces"] = re.split(r"(?= )", row["text"])
        row["prompt_length"] = 1 + row["index"] % 2  # "The" or "The town"
        row["log_p_star"] = [None] + [-0.5 * i for i in range(1, len(row["pieces"]))]
    samples[0]["pieces"][0] = "</script><b>"
    folder = lm_pages.make_run(root / "lm", rows, samples)
    places = [row | {"x": i % 7, "y": i % 5, "share": 0.5} for i, row in enumerate(samples) if not row["seed"]]
    places += [row | {"name": "p*", "arm": "p_star", "tau": None} for row in places[:3]]
    (folder / "embedding_map.jsonl").write_text("".join(json.dumps(row) + "\n" for row in places))
    mixtures = gmm_pages.make_run(root / "gmm", gmm_pages.make_rows(cooled=True))
    other = gmm_pages.make_run(root / "other", gmm_pages.make_rows(cooled=True), num_distill=500)
    compare.write([mixtures, other], root / "compare", names=["gmm", "other"])
    return {
        "lm": lm_page.write(folder), "gmm": gmm_page.write(mixtures), "compare": root / "compare" / "compare.html",
        "knobs": knob_page.write(knob_pages.make_run(root / "knobs")),
    }  # fmt: skip


CHARTS = {
    "lm": ["frontier", "embedding_map", "curves", "divergences", "training"],
    "gmm": ["frontier", "curves"],
    "compare": ["compare"],
    "knobs": ["frontier"],
}


def chart_of(page, name):
    return page.locator(f"figure[data-chart='chart-{name}'] .chart")


def pointed_at(page, name, colour, place=0):
    """Text that shows where the pointer is on a symbol of a chart; those above the diagrams are the legend's."""
    chart = chart_of(page, name)
    chart.scroll_into_view_if_needed()
    top = chart.bounding_box()["y"] + 50
    symbols = [one for one in chart.locator(f"svg path[fill='{colour}']").all() if one.bounding_box()["y"] > top]
    box = symbols[place].bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    return chart.locator("> div:last-child").inner_text()


def opened(browser, path, width, **options):
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page


@slow
@pytest.mark.parametrize("kind", [*CHARTS])
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_nothing_fetched_and_nothing_wider_than_the_window(browser, pages, kind, width, scheme):
    page = opened(browser, pages[kind], width, color_scheme=scheme)
    assert [chart_of(page, name).locator("svg").count() for name in CHARTS[kind]] == [1] * len(CHARTS[kind])
    assert page.locator(".chart").count() == len(CHARTS[kind])
    # no chart reaches into the text below it
    assert page.evaluate(
        "[...document.querySelectorAll('.chart')].every((one) => one.scrollHeight <= one.offsetHeight)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems == []


@slow
def test_pointer_legend_and_click(browser, pages):
    page = opened(browser, pages["lm"], 1200)
    symbols, chart = chart_of(page, "frontier").locator("svg path[d][fill='#d1495b']"), chart_of(page, "frontier")
    (direct,) = [one for one in symbols.all() if one.bounding_box()["y"] > chart.bounding_box()["y"] + 60]
    box = direct.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.get_by_text("click for its samples").locator("..")
    rows = [r for r in lm_pages.make_rows() if r["kind"] == "evaluation" and r["arm"] == "direct"]
    assert f"precision {np.mean([r['precision'] for r in rows]):.3f}"[:-1] in tip.inner_text()
    assert "direct" in tip.inner_text() and "±" in tip.inner_text()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator(".browser .model").input_value() == "direct/seed-0"
    assert page.locator(".browser li").count() == 3
    page.evaluate("scrollTo(0, 0)")
    chart.locator("svg text", has_text="tau = 0.8").first.click()
    assert page.problems == []


@slow
def test_pointer_shows_texts_on_the_map_and_updates_of_trainings(browser, pages):
    page = opened(browser, pages["lm"], 1200)
    text = pointed_at(page, "embedding_map", "#2b5d8a")
    assert "The town of Aveiro lies on the coast." in text and "click for its samples" in text
    text = pointed_at(page, "training", "#d1495b", place=2)
    assert (
        re.search(r"direct\n(training|validation), update \d+\n", text) and "cross-entropy (nats per token): " in text
    )
    chart = chart_of(page, "training")
    drawn = chart.locator("svg path[stroke='#d1495b']").count()
    chart.locator("svg text", has_text="direct").first.click()
    assert chart.locator("svg path[stroke='#d1495b']").count() < drawn and page.problems == []


@slow
def test_pointer_shows_run_and_settings_where_runs_are_compared(browser, pages):
    page = opened(browser, pages["compare"], 1200)
    text = pointed_at(page, "compare", "#ff7f0e")
    assert text.startswith("other\n") and "precision -" in text and "±" in text and "num_distill: 500" in text


@slow
def test_samples_are_searched_and_shaded(browser, pages):
    page = opened(browser, pages["lm"], 1200)
    page.locator(".browser .model").select_option("")
    everything = len(lm_pages.make_samples())
    assert page.locator(".browser .count").inner_text() == f"{everything} of {everything} samples"
    page.locator(".browser .prompt").select_option("The town")
    assert page.locator(".browser li").count() == sum(row["index"] == 1 for row in lm_pages.make_samples())
    page.locator(".browser .prompt").select_option("")
    page.locator(".browser [type=search]").fill("DIRECT none 1 2")
    assert page.locator(".browser li").count() == 1
    spans = page.locator(".browser li span")
    assert spans.nth(0).get_attribute("title") is None and spans.nth(4).get_attribute("title") == "log p* -2.00"
    shades = [spans.nth(i).evaluate("one => one.style.backgroundColor") for i in (2, 8)]
    assert [float(re.findall(r"[\d.]+", shade)[-1]) for shade in shades] == pytest.approx([0.075, 0.3], abs=0.01)
    page.locator(".browser [type=checkbox]").uncheck()
    assert spans.nth(8).evaluate("one => one.style.backgroundColor") == ""
    page.locator(".browser [type=search]").fill("</script><b>")
    assert page.locator(".browser li").count() == 1 and page.locator(".browser li b").count() == 0


@slow
def test_a_button_shows_a_part(browser, pages):
    page = opened(browser, pages["gmm"], 1200)
    whole = chart_of(page, "frontier").locator("svg").inner_html()
    page.get_by_role("button", name="near the direct student").click()
    part = chart_of(page, "frontier").locator("svg").inner_html()
    page.get_by_role("button", name="whole").click()
    assert part != whole and chart_of(page, "frontier").locator("svg").inner_html() == whole


@slow
def test_without_scripts_the_figures_and_tables_are_there(browser, pages):
    page = opened(browser, pages["lm"], 1200, java_script_enabled=False)
    assert (
        all(image.is_visible() for image in page.locator("figure[data-chart] img").all())
        and not page.locator(".browser").is_visible()
    )
    assert page.locator(".samples table").is_visible() and page.get_by_text("shown where scripts run").is_visible()


def test_points_that_are_not_finite_are_left_out():
    point = charts.Point(1.0, 2.0, float("nan"), 0.5, ["a < b"])
    series = [charts.Series("one", [point, point._replace(x=float("inf"))], "red"), charts.Series("none", [], "red")]
    made = charts.chart(series, x_title="x", y_title="y")
    (shown,) = made["panels"][0]["series"]
    assert [one["at"] for one in shown["points"]] == [[1.0, 2.0]] and shown["points"][0]["error"] == [0.0, 0.5]
    assert "<" not in charts.data(made) and json.loads(charts.data(made)) == json.loads(json.dumps(made))
