"""Conversations as the data of a run."""

import dataclasses
import json

import pytest

from configs import lm_laptop
from kd_jax.lm import corpus
from kd_jax.lm.experiment import chain, results
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs import stages
from kd_jax.runs.settings import freeze
from tests.lm.corpus.test_prompt_files import tokenizer
from tests.lm.weights.checkpoints import TINY, write_folder

ALL = 24


@pytest.fixture(scope="module")
def p_star(tmp_path_factory):
    """A model of random weights whose ids are 40 words; id 1 ends a turn, and id 39 a sequence, too."""
    folder = tmp_path_factory.mktemp("models") / "p_star"
    write_folder(folder, architecture=dataclasses.replace(TINY, vocab_size=40), eos_token_id=[39, 1])
    tokenizer().save(folder)
    return folder


@pytest.fixture
def spec_of(p_star, tmp_path, monkeypatch):
    """Settings of a small run of conversations, with changes to them."""
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))

    def make(requests=range(ALL), **changes):
        rows = [{"ask": f"w{4 + i} w5", "answer": "w6 w7"} for i in requests]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = lm_laptop.get_config("smoke")
        config.p_star.update(source=str(p_star), architecture="tiny")
        config.update_from_flattened_dict({
            "data.source": str(tmp_path / "d.jsonl"), "data.prompt_column": "ask", "data.response_column": "answer",
            "sampling.prompt_ids": (2,), "num_train": 8, "num_validation": 4, "num_recall": 6, "num_samples": 6,
            "train.batch_size": 4, **changes,
        })  # fmt: skip
        return freeze(LmSpec, config)

    return make


def run(spec, folder, *groups):
    """Runs groups of stages; returns all stages and their folders."""
    planned = chain.plan(spec, "p*")
    stages.run(folder, planned, groups)
    return planned, stages.folders(folder, planned)


def test_more_samples_than_requests_are_refused_before_any_work(spec_of):
    chain.validate(spec_of())
    with pytest.raises(ValueError, match="config.num_samples=7 is above num_recall=6 prompts"):
        chain.validate(spec_of(num_samples=7))
    chain.validate(spec_of(num_samples=7, **{"evaluation.samples_per_prompt": 2}))


def test_requests_that_come_twice_are_refused_where_they_are_read(spec_of, tmp_path):
    spec = spec_of([0] * ALL)
    chain.validate(spec)
    with pytest.raises(
        ValueError, match="recall's part has 1 prompts: num_samples=6 needs a larger samples_per_prompt"
    ):
        run(spec, tmp_path / "run", "p_star")
    run(spec_of([0] * ALL, **{"evaluation.samples_per_prompt": 6}), tmp_path / "run", "p_star")


def test_rows_are_told_of_all_ends_and_a_run_says_what_is_left_out(spec_of, tmp_path, capsys):
    spec = spec_of()
    with open(tmp_path / "d.jsonl", "a") as file:
        file.write(json.dumps({"ask": "w4", "answer": ""}) + "\n")
    _, folders = run(spec, tmp_path / "run", "p_star")
    assert f"left out of {tmp_path / 'd.jsonl'}: 1 empty\n" in capsys.readouterr().out
    made = corpus.open(folders["p_star/train"] / "corpus")
    assert made.manifest["settings"]["eos_ids"] == [1, 39]
    assert all(ids.tolist()[-3:] == [6, 7, 1] for ids in made.rows().tokens)


def prompts_of(folder):
    """The ids of each row up to the assistant's first word, which comes after id 3."""
    ids = [ids.tolist() for ids in corpus.open(folder / "corpus").rows().tokens]
    return [row[: row.index(3) + 1] for row in ids]


def test_the_teacher_answers_the_requests_of_its_own_corpus(spec_of, p_star, tmp_path):
    changes = {"teachers": 2, "num_recall": 2, "num_samples": 2, "num_train": 4, "num_validation": 2, "taus": (1.0,)}
    spec = spec_of(range(14), **changes, **{
        "teacher.source": str(p_star), "arms": {"more": {"policy": "sequence", "text_rows": 10}}, "contrast.arm": "",
        "evaluation.sample_temperatures": (1.0,), "cooled_arms": (),
    })  # fmt: skip
    planned, folders = run(spec, tmp_path / "run", "p_star", "samples")
    requests = [prompts_of(folders[name]) for name in ("p_star/train", "p_star/teacher-1/train", "p_star/validation")]
    assert sorted(sum(requests, [])) == [[2, 4 + i, 5, 3] for i in range(14)]
    for own, name in zip(requests, ("samples", "samples/teacher-1"), strict=False):
        assert prompts_of(folders[f"{name}/tau-1"]) == own
        # more rows ask the training rows' requests again; those of the validation rows stay the last
        assert prompts_of(folders[f"{name}/tau-1-rows-10"]) == own[:4] + own[:4] + own[:2] + own[4:]
    inputs = {stage.name: stage.inputs for stage in planned}
    assert inputs["samples/tau-1"] == ("p_star/train",)
    assert inputs["samples/teacher-1/tau-1"] == ("p_star/teacher-1/train",)
    # the teacher is evaluated on the requests of the validation rows, which those samples do not answer
    teachers = results._teachers(spec, folders, corpus.open(folders["p_star/validation"] / "corpus"))
    assert [(name, model.entry.samples) for name, model in teachers.items()] == [("teacher/tau-1", None)]


def test_a_choice_among_answers_to_many_requests_is_refused(spec_of):
    arm = {"policy": "sequence", "text_choice": "likeliest", "text_share": 0.5}
    with pytest.raises(ValueError, match="likely: text_choice needs one prompt for all rows"):
        chain.validate(spec_of(arms={"likely": arm}))
