"""The report's door: which page a folder gets, pages beside each other, and what it says of a bad folder."""

import json
import re

import numpy as np
import pytest

from kd_jax import report
from kd_jax.storage import errors
from tests.faults import pages
from tests.gmm.report.test_page import make_rows as mixture_rows
from tests.gmm.report.test_page import make_run as mixture_run
from tests.lm.report.test_page import make_rows, make_run


@pytest.mark.slow
def test_each_folder_gets_the_page_of_its_experiment(tmp_path, capsys):
    gmm = mixture_run(tmp_path / "gmm", mixture_rows(), with_panels=False)
    lm = make_run(tmp_path / "lm", make_rows(seeds=1, taus=(0.8, 1.0)))
    assert report.main(["report", str(lm), str(gmm)]) == 0
    pages = [folder / "report.html" for folder in (lm, gmm)]
    assert capsys.readouterr().out.split() == [str(path) for path in pages]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    assert "<h1>Distilling a language model" in texts[0] and "<h1>Distilling a Gaussian mixture" in texts[1]


def test_a_run_that_is_not_finished_is_named(tmp_path, capsys):
    folder = mixture_run(tmp_path / "gmm", mixture_rows(), with_panels=False)
    for manifest, said in (
        ('{"status": "running"}', "gmm is not finished: its numbers may change (manifest.json, status: running).\n"),
        (None, "gmm has no manifest.json: nothing says that the run is finished.\n"),
        ('{"status": "finished"}', ""),
    ):
        (folder / "manifest.json").unlink(missing_ok=True)
        if manifest:
            (folder / "manifest.json").write_text(manifest)
        assert report.main(["report", str(folder)]) == 0
        assert capsys.readouterr().err == (f"{tmp_path}/{said}" if said else "")
        assert (said.strip() or "<h1>") in (folder / "report.html").read_text(encoding="utf-8")
    # a run writes its page before it is finished
    (folder / "manifest.json").write_text('{"status": "running"}')
    assert "is not finished" not in report.write(folder).read_text(encoding="utf-8")


@pytest.mark.slow
def test_mixture_stands_beside_the_language_model_when_both_are_given(tmp_path):
    gmm = mixture_run(tmp_path / "gmm", mixture_rows(), with_panels=False)
    lm = make_run(tmp_path / "lm", make_rows(seeds=1, taus=(0.8, 1.0)))
    alone = report.write(lm).read_text(encoding="utf-8")
    _, mixture = report.write_all([lm, gmm])
    both = (lm / "report.html").read_text(encoding="utf-8")
    image = re.search(r'base64,([^"]+)"', mixture.read_text(encoding="utf-8"))[1]  # the frontier comes first
    slopes = re.findall(
        r"<td>[0-9]+ to [0-9]+</td><td>([^<]+)</td><td>([^<]+)</td>", mixture.read_text(encoding="utf-8")
    )
    assert len(slopes) == 2
    for piece in (image, *slopes[0], *slopes[1]):
        assert piece in both and piece not in alone


@pytest.mark.parametrize(
    "files, said",
    [
        (None, "no such run folder"),
        ({}, "no config.json"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": "[]"}, "config.json is not a JSON object"),
        ({"config.json": "{}"}, 'config.json: "experiment" is None; it has to be one of: gmm, gmm_frontier, lm'),
        ({"config.json": '{"experiment": ["lm"]}'}, "\"experiment\" is ['lm']"),
        ({"config.json": '{"experiment": "lm"}'}, "no metrics.jsonl"),
        ({"config.json": '{"experiment": "gmm"}', "metrics.jsonl": "\n"}, "is empty"),
        ({"config.json": '{"experiment": "lm"}', "metrics.jsonl": '{"kind": \n'}, "metrics.jsonl, line 1: is not JSON"),
        ({"config.json": '{"experiment": "gmm"}', "metrics.jsonl": '{"kind": "stage"}'}, "row 1: no dim"),
        ({"config.json": '{"experiment": "lm"}', "metrics.jsonl": '{"beta": 1.0}'}, "row 1: no kind"),
        (
            {"config.json": '{"experiment": "lm"}', "metrics.jsonl": b"\xff"},
            "metrics.jsonl, line 1: is not JSON ('utf-8'",
        ),
    ],
)
def test_bad_folder_is_one_line_naming_it_and_code_2(tmp_path, capsys, files, said):
    bad = tmp_path / "bad"
    if files is not None:
        bad.mkdir()
    for name, text in (files or {}).items():
        (bad / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert report.main(["report", str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and str(bad) in error and error.count("\n") == 1
    assert not (bad / "report.html").exists()


def test_no_page_is_written_unless_every_folder_is_a_run(tmp_path):
    good = make_run(tmp_path / "good", make_rows(seeds=1))
    assert report.main(["report", str(good), str(tmp_path / "absent")]) == 2
    assert not (good / "report.html").exists()


@pytest.mark.slow
def test_text_of_a_run_is_text_on_the_page_and_no_formula_in_a_figure(tmp_path):
    """Names and values out of a folder that somebody else wrote, in every place that shows them."""
    mark = '"><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac{$'
    folder = make_run(tmp_path / "lm", [], None)
    rows = [row | {"name": mark + row["name"]} for row in make_rows(seeds=2, taus=(0.8, 1.0))]
    rows += [row | {"arm": mark} for row in rows if row.get("arm") == "distilled" and row["tau"] == 1.0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"name": mark, "arm": mark, "tau": None, "index": 0, "text": mark + "\ud800", "finished": True}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    config = {"experiment": "lm", mark: mark}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {"command": mark, "versions": {mark: mark}, "device": mark, "stages": [{"name": mark, "seconds": 1.0}]}
    manifest |= {"config_differences": {mark: [mark, mark]}, "seconds": {mark: 1.0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    pages.check(report.write(folder), folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert(1)") > 10


def test_what_a_page_may_not_hold():
    for bad in (
        "<script>x</script>",
        "<script src=x></script>",
        "<p onclick=x>",
        "<a href=x>",
        "<img src=x>",
        "<iframe>",
        "<!-- x -->",
    ):
        assert pages.Page(f"<p>a</p>{bad}").wrong
    assert not pages.Page("<p>&lt;script&gt;</p>").wrong


@pytest.mark.parametrize("value", ["x", 10**400, 1e308, 1e-320, [1], {}, True, "NaN x"])
@pytest.mark.parametrize("name", ["precision", "recall_se", "seconds", "tau", "seed", "step", "num_samples"])
def test_values_of_another_kind_are_named(tmp_path, name, value):
    rows = make_rows(seeds=1, taus=(1.0,))
    for row in rows:
        row[name] = value
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, row 1: {name} is .*, not (an integer|a (finite )?number)"):
        report.write(make_run(tmp_path / "run", rows))


@pytest.mark.parametrize("settings, said", [([1], "not an object"), ({"top_k": "x"}, "top_k is 'x', not a number")])
def test_ways_to_learn_that_are_none_are_named(tmp_path, settings, said):
    rows = [row | {"distill": settings} for row in make_rows(seeds=1, taus=(1.0,)) if row["kind"] == "evaluation"]
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, row 1: distill.*{said}"):
        report.write(make_run(tmp_path / "run", rows))


@pytest.mark.parametrize("damage", [{"beta": None}, {"data": np.full((5, 2), np.nan)}], ids=["missing", "no numbers"])
def test_panels_that_cannot_be_drawn_are_named(tmp_path, damage):
    folder = mixture_run(tmp_path / "run", mixture_rows(seeds=1))
    path = folder / "checkpoints" / "panels.npz"
    with np.load(path) as arrays:
        damaged = {**arrays, **damage}
    np.savez(path, **{name: array for name, array in damaged.items() if array is not None})
    with pytest.raises(errors.RunError, match=rf"panels\.npz is damaged: .*{next(iter(damage))}.*; remove it"):
        report.write(folder)
