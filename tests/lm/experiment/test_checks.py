"""Every check that a run makes of its models and data comes before its first stage, from file headers alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import lm_laptop, lm_logits_laptop, lm_text
from kd_jax.lm import weights
from kd_jax.lm.experiment import chain, checks, cost, results, roles
from kd_jax.lm.experiment.arms import arms
from kd_jax.lm.experiment.specs import LmSpec, ModelSpec, architecture
from kd_jax.lm.instruct import templates
from kd_jax.lm.model import PRESETS
from kd_jax.lm.weights import hf_files, load_save
from kd_jax.parallel import devices
from kd_jax.runs import stages
from kd_jax.runs.settings import freeze
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError
from tests.lm.weights.checkpoints import TINY, run_python, tensors_of, write_folder, write_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """p* and models that differ from it in one thing."""
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "p_star")
    write_folder(root / "endless", eos_token_id=None)
    write_folder(root / "other_end", eos_token_id=3)
    write_folder(root / "short", max_position_embeddings=8)
    write_folder(root / "fields", model_type="mystery", architectures=["MysteryForCausalLM"])
    write_folder(root / "larger", architecture=dataclasses.replace(TINY, vocab_size=2 * TINY.vocab_size))
    write_tokenizer(write_folder(root / "tokens", eos_token_id=[0, 2]), TINY.vocab_size)
    config = {"eos_token": "t2", "tokenizer_class": "PreTrainedTokenizerFast"}
    (root / "tokens" / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "data.jsonl").write_text(json.dumps({"text": "a", "ids": [1, 2]}) + "\n")
    (root / "data.pdf").write_text("a")
    return root


SOURCES = (".source", ".init", ".embedding_model")


def spec_of(folders, **changes):
    config = lm_laptop.get_config("smoke")
    config.p_star.update(source=str(folders / "p_star"), architecture="tiny")
    changes = {k: str(folders / v) if k.endswith(SOURCES) and v else v for k, v in changes.items()}
    if any(k.endswith(("student.source", "teacher.init")) for k in changes):  # these give the shape
        role = "student" if "student.source" in changes else "teacher"
        shape = ("layers", "width", "heads", "kv_heads", "mlp")
        changes = {f"{role}.{k}": getattr(ModelSpec(), k) for k in shape} | changes
    config.update_from_flattened_dict(changes)
    return freeze(LmSpec, config)


def test_a_run_that_can_be_is_not_refused_and_no_weights_are_read(folders, monkeypatch):
    monkeypatch.setattr(load_save, "_place", None)
    checks.check_sources(spec_of(folders))
    checks.check_sources(spec_of(folders, **{"teacher.source": "p_star"}))
    checks.check_sources(freeze(LmSpec, lm_laptop.get_config("smoke")))  # random p*


DATA = {"p_star.source": "tokens", "data.source": "data.jsonl", "sampling.prompt_ids": (1,)}
RECORDED = {"distill.policy": "offline", "distill.record_top_k": TINY.vocab_size + 1}


@pytest.mark.parametrize("changes, message", [
    # p*
    ({"p_star.source": "missing"}, "missing"),
    ({"p_star.source": "fields"}, "mystery"),
    ({"p_star.source": "short"}, "has 8 positions, and sequences are up to 16"),
    ({"p_star.source": "endless"}, "no EOS id"),
    ({"sampling.prompt_ids": ()}, "needs a tokenizer, which p\\* does not have"),
    ({"sampling.prompt_ids": (1,) * 16}, "the prompt has 16 ids"),
    ({"sampling.prompt_ids": (TINY.vocab_size,)}, f"the ids of p\\* end at {TINY.vocab_size - 1}"),
    # the teacher, and models that training starts from
    ({"teacher.source": "other_end"}, "ends a sequence with ids \\[3\\], p\\* with \\[2\\]"),
    ({"teacher.source": "short"}, "config.teacher.source has 8 positions"),
    ({"teacher.source": "larger"}, f"has {2 * TINY.vocab_size} ids and p\\* {TINY.vocab_size}: another vocabulary"),
    ({"teacher.source": "missing"}, "missing"),
    ({"student.source": "other_end"}, "config.student.source ends a sequence with ids"),
    ({"teacher.init": "short"}, "config.teacher.init has 8 positions"),
    # data
    ({**DATA, "data.source": "no.jsonl"}, "no.jsonl"),
    ({**DATA, "data.source": "data.pdf"}, "data.pdf cannot be read"),
    ({**DATA, "data.split": "test"}, "split='test'"),
    ({**DATA, "data.text_column": "body"}, "no column 'body'; there are 'text', 'ids'"),
    ({**DATA, "data.text_column": "text", "data.ids_column": "ids"}, "give one of them"),
    ({**DATA, "data.prompt_column": "text"}, "give one of them"),
    ({**DATA, "data.eos_id": 3}, "documents would end with id 3, p\\* ends a sequence with \\[0, 2\\]"),
    ({**DATA, "p_star.source": "p_star"}, "p_star has no tokenizer"),
    # the evaluation
    ({"evaluation.sample_temperatures": (1.0, 1.0)}, "must be different numbers"),
    ({"evaluation.embedding_model": "missing"}, "missing"),
    ({"num_samples": 113}, "config.num_samples=113 is above the 112 samples that the teacher draws at tau-0.5"),
    # arms
    (RECORDED, f"record_top_k={TINY.vocab_size + 1}, and p\\* has {TINY.vocab_size} ids"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_the_first_stage(folders, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a stage has begun"))
    spec = spec_of(folders, **changes)
    with pytest.raises((ValueError, OSError, RunError), match=message):
        chain.run(spec, tmp_path / "run")
    with pytest.raises((ValueError, OSError, RunError), match=message):
        checks.check_sources(spec)  # what --dry_run calls
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, message", [
    ({"evaluation.sample_temperatures": (0.9, 0.8)}, "sample_temperatures=.* must have 1.0 among them"),
    ({"evaluation.sample_temperatures": (1.0,)}, "cooled_arms=.* has no effect: .* has one value"),
    ({"evaluation.embedding_model": "larger", "num_recall": 11}, "needs more than 5 points, and there are 5"),
    ({"sampling.prompts": ("templates",)}, "sampling.prompt_ids=.* has no effect"),
    ({"sampling.prompts": ("templates",), "sampling.prompt_ids": (), "sampling.prompt": "Once"}, "'Once' has no"),
])  # fmt: skip
def test_settings_that_do_not_go_together(folders, changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check(spec_of(folders, **changes))


@pytest.mark.parametrize("embedder", ["", "larger"])
def test_embeddings_of_a_teacher_that_is_p_star_are_of_new_samples(folders, embedder):
    """Beside the rows of p* themselves, it would seem to have their distribution to the last digit."""
    config, p_star = lm_logits_laptop.get_config("online,smoke"), str(folders / "p_star")
    config.p_star.update(source=p_star, architecture="tiny")
    config.teacher.source, config.evaluation.embedding_model = p_star, embedder and str(folders / embedder)
    (teacher,) = results._teachers(freeze(LmSpec, config), {}, "rows of p*").values()
    assert teacher.entry.samples == (None if embedder else "rows of p*")


def test_instructions_have_room_for_an_answer():
    asked = [one.prompt for split in ("validation", "test") for one in templates.instructions(split, 2)]
    longest = max(len(prompt.encode()) for prompt in asked)  # a random p* takes bytes as ids
    enough = -(-4 * longest // 3)  # a quarter is left

    def spec_of(max_length):
        config = lm_laptop.get_config("smoke")
        config.instruct.update(num_validation=2, num_test=2)
        config.sampling.max_length = max_length
        return freeze(LmSpec, config)

    checks.check_sources(spec_of(enough))
    with pytest.raises(ValueError, match=f"instruction of {longest} ids .*: raise it to {enough} or more"):
        checks.check_sources(spec_of(enough - 2))


def test_amounts_of_text_follow_the_number_of_rows():
    config = lm_text.get_config("smoke")
    config.update_from_flattened_dict({"num_train": 200, "arms.x4.text_rows": 7})
    rows = {arm.name: arm.text.rows for arm in arms(freeze(LmSpec, config))}
    assert (rows["x2"], rows["x4"], rows["x16"]) == (400, 7, 3200)


def test_data_end_with_any_of_several_ends(folders):
    for eos_id in (None, 0, 2):  # none is the tokenizer's, 2
        checks.check_sources(spec_of(folders, **DATA, **{"data.eos_id": eos_id}))


MESHES = """
import sys
from configs import lm_laptop
from kd_jax.lm.experiment import chain, checks
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs import stages
from kd_jax.runs.settings import freeze
from kd_jax.runs.stages import Stage

stages.run = lambda *_: sys.exit("a stage has begun")
for changes in eval(sys.argv[2]):
    config = lm_laptop.get_config("smoke")
    config.p_star.update(source=sys.argv[1] + "/p_star", architecture="")
    config.update_from_flattened_dict(changes)
    spec = freeze(LmSpec, config)
    try:
        chain.validate(spec)
        chain.run(spec, sys.argv[1] + "/run")
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_models_of_any_source_are_split_over_the_mesh_before_the_first_stage(folders):
    """On three devices: tiny has 4 heads and a width of 64; teacher and student are made to fit."""
    three = {"mesh.tensor": 3, "mesh.data": 1}
    for role in ("teacher", "student"):
        three |= {f"{role}.{key}": size for key, size in {"heads": 3, "kv_heads": 3, "width": 24, "mlp": 24}.items()}
    source = {"teacher.source": str(folders / "p_star"), "distill.policy": "online"}
    changes = [three, {**source, "teacher_mesh.tensor": 3, "teacher_mesh.data": 1}]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    lines = run_python(MESHES, folders, changes, PYTHONPATH=str(ROOT), **environment).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "config.p_star cannot be split over config.mesh", "config.teacher cannot be split over config.teacher_mesh",
    ]  # fmt: skip


def test_what_has_no_room_is_said_before_the_first_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a stage has begun"))
    spec = freeze(LmSpec, lm_laptop.get_config("smoke"))
    with monkeypatch.context() as changed:
        changed.setattr(cost.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e5))
        with pytest.raises(RunError, match=f"need 1.0 MB, and {tmp_path} has 0.1 MB free: make room there"):
            chain.run(spec, tmp_path / "run")
        cost.check_room(spec, tmp_path / "run", chain.plan(spec, "p*"), ["p_star"])  # trains nothing
        chain.run(spec, tmp_path / "run", dry_run=True)
        assert "not on this machine: models and checkpoints need" in capsys.readouterr().out
    monkeypatch.setattr(devices, "memory", lambda: 1e5)
    with pytest.raises(RunError, match="p_star/train needs .* GiB a device for weights alone"):
        chain.run(spec, tmp_path / "run")
    left = [Stage("teacher", {}, (), None, cost.training(spec, TINY))]  # float32 weights, gradient and two moments
    monkeypatch.setattr(devices, "memory", lambda: 16 * TINY.num_parameters - 1)
    with pytest.raises(RunError, match="teacher needs .* GiB a device for weights, gradient and moments alone"):
        cost.check_room(spec, tmp_path, left)
    monkeypatch.setattr(devices, "memory", lambda: 16 * TINY.num_parameters)
    cost.check_room(spec, tmp_path, left)
    assert not (tmp_path / "run").exists()


def test_a_plan_says_what_it_does_not_know(folders, tmp_path, capsys):  # N21
    spec = spec_of(folders, **{"p_star.architecture": ""})
    # not at hand, so that its shape is not known
    spec = dataclasses.replace(spec, p_star=dataclasses.replace(spec.p_star, source="someone/model"))
    chain.run(spec, tmp_path / "run", dry_run=True)
    shown = capsys.readouterr().out
    assert "?: unknown until p* is there" in shown and "nan" not in shown


def test_a_source_at_hand_is_planned_with_its_own_shape(folders, tmp_path, capsys):
    shape = weights.describe(folders / "p_star").architecture
    assert shape != PRESETS["smollm2-360m"]
    chain.run(spec_of(folders, **{"p_star.architecture": "smollm2-360m"}), tmp_path / "run", dry_run=True)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("p_star/train"))
    assert f"{shape.num_parameters:,}" in row


@pytest.mark.parametrize("cached", [False, True])
def test_a_source_on_the_hub_is_planned_by_its_config_or_it_is_said(folders, tmp_path, monkeypatch, capsys, cached):
    """Whatever preset the config names. Only config.json is there, as where the weights are yet to be fetched."""
    source = f"someone/cached-{cached}"
    (tmp_path / "hub").mkdir()
    shutil.copy(folders / "larger" / "config.json", tmp_path / "hub")

    def snapshot_download(repository, revision, allow_patterns, **_):
        if not cached or (repository, allow_patterns) != (source, ["config.json"]):
            raise OSError("offline")
        return str(tmp_path / "hub")

    monkeypatch.setattr(hf_files.huggingface_hub, "snapshot_download", snapshot_download)
    spec = spec_of(folders, **{"p_star.architecture": "smollm2-135m"})
    spec = dataclasses.replace(spec, p_star=dataclasses.replace(spec.p_star, source=source))
    chain.run(spec, tmp_path / "run", dry_run=True)
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("p_star/train"))
    # twice tiny's vocabulary, by hand; and the published size
    more = TINY.vocab_size * TINY.hidden_size
    number = sum(array.size for array in tensors_of(TINY).values()) + more if cached else 134_515_008
    assert f" {number:,} " in row
    assert (f"p*: planned as smollm2-135m; {source} cannot be read here" in shown) != cached


def test_a_shape_beside_a_start_has_no_effect(folders):
    with pytest.raises(
        ValueError, match="student.layers has no effect: .* gives the shape; undo: --config.student.layers=2"
    ):
        spec_of(folders, **{"student.source": "p_star", "student.layers": 3})


def test_a_shallower_start(folders):
    spec = spec_of(folders, **{"student.source": "p_star", "student.layers_kept": "1"})
    assert architecture(spec.student, TINY, "student") == dataclasses.replace(TINY, num_hidden_layers=1)
    with pytest.raises(ValueError, match="layers_kept='sometimes' is neither numbers"):
        architecture(dataclasses.replace(spec.student, layers_kept="sometimes"), TINY, "student")
    two = dataclasses.replace(spec.student, layers_kept="0, 1")
    assert architecture(two, TINY, "student") == dataclasses.replace(TINY, num_hidden_layers=2)
    for unclear in ("0,1,", "0,,1", "²"):
        with pytest.raises(ValueError, match=f"layers_kept='{unclear}' is neither numbers"):
            architecture(dataclasses.replace(spec.student, layers_kept=unclear), TINY, "student")
    with pytest.raises(ValueError, match="student.layers_kept='1' has no effect"):
        spec_of(folders, **{"student.layers_kept": "1"})


def test_something_has_to_be_trained(folders):
    whole = ("embedding", "norm", "layers")
    for patterns in (whole, (*whole, "layers.0.q"), ("embedding", "norm", "layers.0-1", "layers.2")):
        spec = spec_of(folders, **{"student.source": "p_star", "student.train.frozen": patterns})
        with pytest.raises(ValueError, match=r"config\.student\.train\.frozen=\(.*\) leaves nothing to train"):
            checks.check_sources(spec)
    checks.check_sources(spec_of(folders, **{"student.source": "p_star", "student.train.frozen": whole[1:]}))


def test_a_start_is_hashed_once(folders, monkeypatch):
    spec, hashed = spec_of(folders, **{"student.source": "p_star", "seeds": 3}), []
    monkeypatch.setattr(roles.weights, "identity", lambda source: hashed.append(source) or "1" * 64)
    roles.source_identity.cache_clear()
    started = [stage for stage in chain.plan(spec, "p*'s") if "start" in stage.settings]
    roles.source_identity.cache_clear()
    assert len(started) > 3 and {stage.settings["start"] for stage in started} == {"1" * 64}
    assert hashed == [spec.student.source]


SHAPE = {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}
START = {"student.source": "p_star", **{f"student.{key}": value for key, value in SHAPE.items()}}


@pytest.mark.parametrize("changes, message", [
    ({"student.lora.rank": 4}, "student.lora.rank=4 needs student.source"),
    ({"train.frozen": ("embedding",)}, "of the teacher. needs teacher.init"),
    ({"student.train.frozen": ("norm",)}, "of the student. needs student.source"),
    ({**START, "student.lora.alpha": 4.0}, "student.lora has no effect with rank=0"),
    ({**START, "student.lora.targets": ("q_proj",)}, "config.student.lora.targets='q_proj' must be one of q, k"),
    ({**START, "student.lora.rank": 4, "student.train.frozen": ("norm",)}, "student.lora trains adapters alone"),
    ({**START, "student.train.frozen": ("layers.9",)}, "frozen pattern 'layers.9' names layers that are not among 0"),
    ({**START, "student.train.frozen": ("layers.q_bias",)}, "frozen pattern 'layers.q_bias': layers of this model"),
])  # fmt: skip
def test_parts_that_cannot_be_trained(folders, changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check_sources(spec_of(folders, **changes))
