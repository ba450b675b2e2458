"""The knobs of selectivity of language models: what the config may say of them."""

import json
import re

import pytest
from ml_collections import ConfigDict

from configs import lm, lm_frontier, lm_laptop
from kd_jax.lm.experiment import arms, chain, knobs
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs.settings import freeze

KNOBS = (
    ("tau", (("1", "tau-1"), ("0.5", "tau-0.5"))),
    ("top-k", (("all", "tau-1"), ("20", "topk"))),
    ("divergence", (("forward KL", "fkl"), ("reverse KL", "rkl"))),
)
ARMS = {
    "topk": {"policy": "sequence", "sampler": {"top_k": 20}},
    "fkl": {"policy": "online"},
    "rkl": {"policy": "online", "divergence": "reverse_kl"},
}


def config(**changes):
    """The laptop's smoke with knobs on its arms."""
    found = lm_laptop.get_config("smoke")
    found.arms = ConfigDict({name: ConfigDict(how) for name, how in ARMS.items()})
    found.frontier.update({"knobs": KNOBS, "references": ("tau-1", "fkl"), **changes})
    return found


def validate(config):
    chain.validate(freeze(LmSpec, config))


def test_config_says_which_arms_are_whose_settings():
    validate(config())
    found = knobs.read(config())
    assert found.arms == ["tau-1", "tau-0.5", "topk", "fkl", "rkl"]
    assert [found.neutral(knob.name) for knob in found.knobs] == ["tau-1", "tau-1", "fkl"]
    assert found.label("tau-1") == "tau = 1, top-k = all" and found.label("rkl") == "divergence = reverse KL"
    # through JSON, as a run's folder has it
    assert knobs.read(json.loads(json.dumps({"frontier": {**config().frontier.to_dict()}}))) == found


def test_without_knobs_there_is_no_frontier():
    assert knobs.read(lm.get_config()) is None and knobs.read({}) is None


@pytest.mark.parametrize("changes, message", [
    ({"references": ("tau-1", "fkl", "tau-2")}, "config.frontier.references: 'tau-2' is not one of the run's arms"),
    ({"references": ()}, "config.frontier.references=(): none is a setting of tau"),
    ({"references": ("tau-1",)}, "config.frontier.references=('tau-1',): none is a setting of divergence"),
    ({"gains": ()}, "config.frontier.gains is empty"),
    ({"gains": (0.5, -1.0)}, "config.frontier.gains=-1.0 must be above 0"),
    ({"gains": (float("inf"),)}, "config.frontier.gains=inf must be finite"),
    ({"knobs": (("tau", (("1", "tau-1"), ("2", "tau-2"))),)}, "config.frontier.knobs: tau: 'tau-2'"),
    ({"knobs": (("tau", ()),)}, "('tau', ()) is not (name"),
    ({"knobs": (*KNOBS, KNOBS[0])}, "has a name twice: tau, top-k, divergence, tau"),
    ({"knobs": (("tau", (("1", "tau-1"), ("1", "tau-0.5"))),)}, "tau has a setting twice: 1, 1"),
    ({"knobs": (("tau", (("1", "tau-1"), ("0.5", "tau-1"))),)}, "tau has a setting twice: tau-1, tau-1"),
    ({"knobs": (("tau", ((1.0, "tau-1"),)),)}, "all of them text"),
    ({"knobs": ("tau",)}, "'tau' is not (name, ((value, arm), ...))"),
])  # fmt: skip
def test_faults_before_any_work(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config(**changes))


# What each knob of the config is to turn, of what an arm says of its samples and of its loss.
TURNS = {
    "tau": "sample_temperature", "top-p": "top_p", "top-k": "top_k", "teacher temperature": "teacher_temperature",
    "loss temperature": "loss_temperature", "divergence": "divergence", "lambda": "on_policy_fraction",
}  # fmt: skip


@pytest.mark.parametrize("variant", ["", "smoke"])
def test_a_knob_of_the_config_turns_one_thing(variant):
    made = lm_frontier.get_config(variant)
    validate(made)
    found, by_name = knobs.read(made), {arm.name: arm for arm in arms.arms(freeze(LmSpec, made))}
    assert {knob.name for knob in found.knobs} == set(TURNS)
    assert set(by_name) == {"direct", *found.arms}  # every student is on the figure
    for knob in found.knobs:
        settings = []
        for _, name in knob.settings:
            arm = by_name[name]
            samples = {} if arm.sampler is None else vars(arm.sampler)
            loss = {} if arm.distill is None else vars(arm.distill).copy()
            if loss.get("policy") == "online":  # as on-policy learning without any
                loss |= {"policy": "on_policy", "on_policy_fraction": 0.0}
            settings.append({**samples, **loss, "p_star": arm.p_star})
        values = [each.pop(TURNS[knob.name]) for each in settings]
        assert len(set(values)) == len(values) >= 2, knob.name
        assert all(each == settings[0] for each in settings), knob.name
        texts = [text for text, _ in knob.settings if text != "all" and knob.name != "divergence"]
        # the neutral setting is 1 where it is not said, and top-k's "all"
        neutral = {None: 1.0}
        assert [float(t) for t in texts] == [neutral.get(v, v) for v in values][len(values) - len(texts) :] or not texts
