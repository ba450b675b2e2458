"""Every check that a run makes of its models and data comes before its first stage, from file headers alone."""

import dataclasses
import json

import pytest

from configs import lm_laptop
from kd_jax.lm.experiment import chain, checks
from kd_jax.lm.experiment.specs import LmSpec, architecture
from kd_jax.lm.weights import load_save
from kd_jax.runs import stages
from kd_jax.runs.settings import freeze
from kd_jax.storage.errors import RunError
from tests.lm.weights.checkpoints import TINY, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """p* and models that differ from it in one thing."""
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "p_star")
    write_folder(root / "endless", eos_token_id=None)
    write_folder(root / "other_end", eos_token_id=3)
    write_folder(root / "short", max_position_embeddings=8)
    write_folder(root / "fields", model_type="mystery", architectures=["MysteryForCausalLM"])
    (root / "data.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    return root


def spec_of(folders, **changes):
    config = lm_laptop.get_config("smoke")
    config.p_star.update(source=str(folders / "p_star"), architecture="tiny")
    changes = {k: str(folders / v) if k.endswith(".source") and v else v for k, v in changes.items()}
    config.update_from_flattened_dict(changes)
    return freeze(LmSpec, config)


def test_a_run_that_can_be_is_not_refused_and_no_weights_are_read(folders, monkeypatch):
    monkeypatch.setattr(load_save, "_place", None)
    checks.check_sources(spec_of(folders))
    checks.check_sources(spec_of(folders, **{"teacher.source": "p_star"}))
    checks.check_sources(freeze(LmSpec, lm_laptop.get_config("smoke")))  # random p*


@pytest.mark.parametrize("changes, message", [
    ({"p_star.source": "missing"}, "missing"),
    ({"p_star.source": "fields"}, "mystery"),
    ({"p_star.source": "short"}, "has 8 positions, and sequences are up to 16"),
    ({"p_star.source": "endless"}, "no EOS id"),
    ({"sampling.prompt_ids": ()}, "needs a tokenizer, which p\\* does not have"),
    ({"sampling.prompt_ids": (1,) * 16}, "the prompt has 16 ids"),
    ({"sampling.prompt_ids": (TINY.vocab_size,)}, f"the ids of p\\* end at {TINY.vocab_size - 1}"),
    ({"teacher.source": "other_end"}, "ends a sequence with ids \\[3\\], p\\* with \\[2\\]"),
    ({"teacher.source": "short"}, "config.teacher.source has 8 positions"),
    ({"teacher.source": "missing"}, "missing"),
    ({"data.source": "no.jsonl"}, "no.jsonl"),
    ({"evaluation.sample_temperatures": (1.0, 1.0)}, "must be different numbers"),
    ({"evaluation.embedding_model": "missing"}, "missing"),
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
    ({"student.source": "other_end"}, "config.student.source ends a sequence with ids"),
    ({"teacher.init": "short"}, "config.teacher.init has 8 positions"),
])  # fmt: skip
def test_a_start_has_to_go_with_p_star(folders, changes, message):
    role = next(iter(changes)).split(".")[0]
    default = {f"{role}.{k}": v for k, v in {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}.items()}
    with pytest.raises(ValueError, match=message):
        checks.check_sources(spec_of(folders, **{k: str(folders / v) for k, v in changes.items()}, **default))


def test_a_shape_beside_a_start_has_no_effect(folders):
    with pytest.raises(ValueError, match="config.student.layers has no effect: .* gives the shape"):
        spec_of(folders, **{"student.source": "p_star"})


def test_a_shallower_start(folders):
    default = {f"student.{k}": v for k, v in {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}.items()}
    spec = spec_of(folders, **default, **{"student.source": "p_star", "student.layers_kept": "1"})
    assert architecture(spec.student, TINY, "student") == dataclasses.replace(TINY, num_hidden_layers=1)
    with pytest.raises(ValueError, match="layers_kept='sometimes' is neither numbers"):
        architecture(dataclasses.replace(spec.student, layers_kept="sometimes"), TINY, "student")
    with pytest.raises(ValueError, match="student.layers_kept='1' has no effect"):
        spec_of(folders, **{"student.layers_kept": "1"})


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
])  # fmt: skip
def test_parts_that_cannot_be_trained(folders, changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check_sources(spec_of(folders, **changes))
