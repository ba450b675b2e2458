"""The instruction experiment's smoke form, from config to page."""

import subprocess
import sys

import pytest

from configs import lm_instruct_laptop, lm_instruct_paper
from kd_jax.lm import corpus
from kd_jax.lm.corpus import prompt_files
from kd_jax.lm.experiment import chain
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs.settings import freeze
from kd_jax.storage.files import read_rows


@pytest.mark.parametrize(
    "config", [lm_instruct_laptop.get_config(), lm_instruct_laptop.get_config("smoke"), lm_instruct_paper.get_config()],
    ids=["laptop", "smoke", "paper"],
)  # fmt: skip
def test_configs_are_valid(config):
    chain.validate(freeze(LmSpec, config))


def test_too_few_prompts_are_refused():
    config = lm_instruct_laptop.get_config("smoke")
    config.num_samples = 17
    with pytest.raises(ValueError, match="num_samples=17 is above num_recall=16 prompts"):
        chain.validate(freeze(LmSpec, config))


def test_a_choice_among_answers_to_many_prompts_is_refused():
    config = lm_instruct_laptop.get_config("smoke")
    config.arms["likely"] = {"policy": "sequence", "text_choice": "likeliest", "text_share": 0.5}
    with pytest.raises(ValueError, match="likely: text_choice needs one prompt for all rows"):
        chain.validate(freeze(LmSpec, config))


@pytest.mark.slow  # CI runs it, though it is long: it is the only one of the whole experiment
def test_from_config_to_page(tmp_path):
    words = ["--config", "configs/lm_instruct_laptop.py:smoke", "--workdir", str(tmp_path / "w")]

    def run(*more):
        done = subprocess.run([sys.executable, "-m", "kd_jax.train", *words, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "logits/seed-0" in run("--dry_run") and not (tmp_path / "w").exists()
    run()
    folder = tmp_path / "w"
    rows = read_rows(folder / "metrics.jsonl")
    arms = {"direct", "distilled", "logits", "sharpened"}
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    assert {row["arm"] for row in evaluated} == arms | {"teacher"}
    assert all(row["precision"] < 0 and row["recall"] < 0 for row in evaluated)
    checked = [row for row in rows if row["kind"] == "instruct"]
    assert {row["arm"] for row in checked} == arms | {"p_star"} and len(checked) == 5 * 2 * 2
    assert all(0 <= row["pass_rate"] <= row["best_of_n"] <= 1 for row in checked)
    # no prompt is learnt and measured with
    read = {
        name: {
            tuple(ids)
            for path in (folder / "stages" / "p_star").glob(f"{name}-*")
            for ids in prompt_files.of_rows(corpus.open(path / "corpus").rows())
        }
        for name in ("train", "validation")
    }
    assert len(read["train"]) == 48 + 8 and len(read["validation"]) == 16 and not read["train"] & read["validation"]
    answers = read_rows(folder / "answers.jsonl")
    assert len(answers) == 5 * 2 * 6 and {row["name"] for row in answers} == {row["name"] for row in checked}
    html = (folder / "report.html").read_text()
    assert "Instructions: pass rates" in html and 'class="verdict wrong"' in html
    assert "The declared contrast" not in html  # a smoke run decides nothing
    before = (folder / "metrics.jsonl").read_text()
    run()
    assert (folder / "metrics.jsonl").read_text() == before
