"""The report's door: which page a folder gets, pages beside each other, and what it says of a bad folder."""

import re

import pytest

from kd_jax import report
from tests.gmm.test_report import make_rows as mixture_rows
from tests.gmm.test_report import make_run as mixture_run
from tests.lm.test_report import make_rows, make_run


def test_each_folder_gets_the_page_of_its_experiment(tmp_path, capsys):
    gmm = mixture_run(tmp_path / "gmm", mixture_rows(), with_panels=False)
    lm = make_run(tmp_path / "lm", make_rows(seeds=1, taus=(0.8, 1.0)))
    assert report.main([str(lm), str(gmm)]) == 0
    pages = [folder / "report.html" for folder in (lm, gmm)]
    assert capsys.readouterr().out.split() == [str(path) for path in pages]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    assert "<h1>Distilling a language model" in texts[0] and "<h1>Distilling a Gaussian mixture" in texts[1]


def test_mixture_stands_beside_the_language_model_when_both_are_given(tmp_path):
    gmm = mixture_run(tmp_path / "gmm", mixture_rows(), with_panels=False)
    lm = make_run(tmp_path / "lm", make_rows(seeds=1, taus=(0.8, 1.0)))
    alone = report.write(lm).read_text(encoding="utf-8")
    _, mixture = report.write_all([lm, gmm])
    both = (lm / "report.html").read_text(encoding="utf-8")
    image = re.search(r'base64,([^"]+)"', mixture.read_text(encoding="utf-8"))[1]  # the frontier comes first
    slopes = re.findall(r"<td>(?:precision|recall)</td><td>([^<]+)</td>", mixture.read_text(encoding="utf-8"))
    assert len(slopes) == 2
    for piece in (image, *slopes):
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
        ({"config.json": '{"experiment": "lm"}', "metrics.jsonl": '{"kind": \n'}, "metrics.jsonl, line 1: not JSON"),
        ({"config.json": '{"experiment": "gmm"}', "metrics.jsonl": '{"kind": "stage"}'}, "row 1: no dim"),
        ({"config.json": '{"experiment": "lm"}', "metrics.jsonl": '{"beta": 1.0}'}, "row 1: no kind"),
        ({"config.json": '{"experiment": "lm"}', "metrics.jsonl": b"\xff"}, "metrics.jsonl, line 1: not JSON ('utf-8'"),
    ],
)
def test_bad_folder_is_one_line_naming_it_and_code_2(tmp_path, capsys, files, said):
    bad = tmp_path / "bad"
    if files is not None:
        bad.mkdir()
    for name, text in (files or {}).items():
        (bad / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert report.main([str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and str(bad) in error and error.count("\n") == 1
    assert not (bad / "report.html").exists()


def test_no_page_is_written_unless_every_folder_is_a_run(tmp_path):
    good = make_run(tmp_path / "good", make_rows(seeds=1))
    assert report.main([str(good), str(tmp_path / "absent")]) == 2
    assert not (good / "report.html").exists()
