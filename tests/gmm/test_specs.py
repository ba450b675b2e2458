"""Settings that cannot work are refused, by name, before any work."""

import pytest

from configs import gmm, gmm_frontier, gmm_wide
from kd_jax import train
from kd_jax.gmm import experiment, frontier
from kd_jax.gmm.specs import GmmFrontierSpec, GmmSpec
from kd_jax.runs.settings import describe, freeze

INF = float("inf")


@pytest.mark.parametrize(
    "change, word",
    [({"seeds": 0}, "config.seeds"), ({"beta_min": 0.0}, "beta_min"), ({"dim": 1}, "dim"),
     ({"covariance_type": "x"}, "covariance_type"), ({"student_components": 300}, "num_data"),
     ({"memory_gib": 0.0}, "memory_gib"), ({"tol": float("nan")}, "tol"), ({"seed": -1}, "seed"),
     ({"seed": 2**32 - 1}, "seed"), ({"beta_max": INF}, "beta_max"), ({"beta_min": 2.0, "beta_max": 1.0}, "beta_min"),
     ({"separation": float("nan")}, "separation"), ({"vary": {"teacher_components": (0,)}}, "teacher_components"),
     ({"vary": {"num_data": (99.5,)}}, "config.vary.num_data"), ({"memory_gib": INF}, "memory_gib"),
     ({"sample_temperatures": (1.0, 0.8, 0.8)}, "a value twice"), ({"shares": (0.5, 0.5)}, "a value twice"),
     ({"vary": {"num_data": (2,)}}, "num_data"), ({"seeeds": 3}, "seeds")],
)  # fmt: skip
def test_values_that_cannot_work_are_named(change, word):
    config = gmm.get_config()
    with config.unlocked():
        config.update(change)
    with pytest.raises(ValueError, match=word):
        freeze(GmmSpec, config)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"seeds": 0}, "seeds"), ({"covariance_type": "full"}, "covariance_type"), ({"num_draws": 0}, "num_draws"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"gains": (1.0, 0.0)}, "gains"), ({"dim": 1}, "dim"),
        ({"knobs": {"beta": (1.0, INF)}}, "knobs.beta"), ({"knobs": {"top_k": (0,)}}, "knobs.top_k"),
        ({"knobs": {"beta": (1.0, 10.0, 10.0)}}, "a value twice"),
        ({"knobs": {"top_k": (5,)}}, "knobs.top_k"), ({"knobs": {"top_p": (0.0,)}}, "knobs.top_p"),
        ({"knobs": {"jensen_shannon": (1.5,)}}, "knobs.jensen_shannon"),
        ({"knobs": {"skew_forward_kl": (1.0,)}}, "knobs.skew_forward_kl"),
        ({"knobs": {"jensen_shannon": (), "skew_forward_kl": (), "skew_reverse_kl": ()}}, "divergence"),
    ],
)  # fmt: skip
def test_values_of_the_frontier_that_cannot_work_are_named(change, word):
    config = gmm_frontier.get_config()
    config.update(change)
    with pytest.raises(ValueError, match=word):
        freeze(GmmFrontierSpec, config)


def test_every_config_freezes_and_every_setting_says_what_it_is():
    for config in (gmm.get_config(), gmm.get_config("smoke"), gmm_wide.get_config()):
        freeze(GmmSpec, config)
    for arg in ("", "smoke"):
        freeze(GmmFrontierSpec, gmm_frontier.get_config(arg))
    for kind in (GmmSpec, GmmFrontierSpec):
        assert all(setting.meaning for setting in describe(kind))


# What several settings rule out together; the range of each one alone is with its declaration.
@pytest.mark.parametrize(
    "config, flags, text",
    [
        ("gmm", {"beta_min": 2, "beta_max": 1}, "beta_min=2.0 must not be above beta_max=1.0"),
        ("gmm", {"beta_max": 1}, "one beta needs equal ends"),
        ("gmm", {"num_betas": 1}, "one beta needs equal ends"),
        ("gmm", {"num_data": 3}, "num_data=3 points are fewer than 4 components"),
        ("gmm", {"num_distill": 3, "student_components": 4}, "num_distill=3 points are fewer than 4 components"),
        ("gmm", {"vary.num_data": "(2,)"}, "num_data=2 points are fewer than 4 components"),
        ("gmm", {"vary.grid": "(200,)"}, "num_data=100 points are fewer than 200 components"),
        ("gmm", {"sample_temperatures": "(0.9,)"}, "must contain 1.0"),
        ("gmm", {"seed": 2**32 - 1, "seeds": 2}, "must be at most 2**32"),
        ("gmm_frontier", {"covariance_type": "full"}, "fits by gradient are diagonal"),
        ("gmm_frontier", {"knobs.top_k": "(5,)"}, "knobs.top_k=(5,) must be at most 4"),
        ("gmm_frontier", {"knobs.jensen_shannon": "()", "knobs.skew_forward_kl": "()", "knobs.skew_reverse_kl": "()"},
         "at least one divergence"),
        ("gmm_frontier", {"teacher_components": 101, "num_data": 100}, "num_data=100 points are fewer"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_ends_at_the_door(config, flags, text, tmp_path, monkeypatch, capsys):
    for module in (experiment, frontier):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("the run has begun"))
    words = [f"--config.{name}={value}" for name, value in flags.items()]
    assert train.main(["train", f"--config=configs/{config}.py", f"--workdir={tmp_path / 'w'}", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()
