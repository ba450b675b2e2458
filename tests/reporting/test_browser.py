"""Pages in a real browser: charts that show what is under the pointer, and the browser of samples.

Chromium has to be installed (Debian: apt install chromium); without it these tests are skipped.
"""

import json
import re
import shutil

import numpy as np
import pytest

from kd_jax.gmm.report import page as gmm_page
from kd_jax.lm.report import page as lm_page
from kd_jax.reporting import charts
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
        row["log_p_star"] = [None] + [-0.5 * i for i in range(1, len(row["pieces"]))]
    samples[0]["pieces"][0] = "</script><b>"
    lm = lm_page.write(lm_pages.make_run(root / "lm", rows, samples))
    return {"lm": lm, "gmm": gmm_page.write(gmm_pages.make_run(root / "gmm", gmm_pages.make_rows(cooled=True)))}


def opened(browser, path, width, **options):
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page


@slow
@pytest.mark.parametrize("kind", ["lm", "gmm"])
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_nothing_fetched_and_nothing_wider_than_the_window(browser, pages, kind, width, scheme):
    page = opened(browser, pages[kind], width, color_scheme=scheme)
    assert page.locator(".chart svg").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems == []


@slow
def test_pointer_legend_and_click(browser, pages):
    page = opened(browser, pages["lm"], 1200)
    symbols = page.locator(".chart svg path[d][fill='#d1495b']")
    (direct,) = [
        one for one in symbols.all() if one.bounding_box()["y"] > page.locator(".chart").bounding_box()["y"] + 60
    ]
    box = direct.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.get_by_text("click for its samples").locator("..")
    rows = [r for r in lm_pages.make_rows() if r["kind"] == "evaluation" and r["arm"] == "direct"]
    assert f"precision {np.mean([r['precision'] for r in rows]):.3f}"[:-1] in tip.inner_text()
    assert "direct" in tip.inner_text() and "±" in tip.inner_text()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator(".browser select").input_value() == "direct/seed-0"
    assert page.locator(".browser li").count() == 3
    page.evaluate("scrollTo(0, 0)")
    page.locator(".chart svg text", has_text="tau = 0.8").first.click()
    assert page.problems == []


@slow
def test_samples_are_searched_and_shaded(browser, pages):
    page = opened(browser, pages["lm"], 1200)
    page.locator(".browser select").select_option("")
    everything = len(lm_pages.make_samples())
    assert page.locator(".browser .count").inner_text() == f"{everything} of {everything} samples"
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
    whole = page.locator(".chart svg").inner_html()
    page.get_by_role("button", name="near the direct student").click()
    part = page.locator(".chart svg").inner_html()
    page.get_by_role("button", name="whole").click()
    assert part != whole and page.locator(".chart svg").inner_html() == whole


@slow
def test_without_scripts_the_figures_and_tables_are_there(browser, pages):
    page = opened(browser, pages["lm"], 1200, java_script_enabled=False)
    assert page.locator("figure[data-chart] img").is_visible() and not page.locator(".browser").is_visible()
    assert page.locator(".samples table").is_visible() and page.get_by_text("shown where scripts run").is_visible()


def test_points_that_are_not_finite_are_left_out():
    point = charts.Point(1.0, 2.0, float("nan"), 0.5, ["a < b"])
    series = [charts.Series("one", [point, point._replace(x=float("inf"))], "red"), charts.Series("none", [], "red")]
    made = charts.chart(series, x_title="x", y_title="y")
    (shown,) = made["series"]
    assert [one["at"] for one in shown["points"]] == [[1.0, 2.0]] and shown["points"][0]["error"] == [0.0, 0.5]
    assert "<" not in charts.data(made) and json.loads(charts.data(made)) == json.loads(json.dumps(made))
