"""Settings that are declared once: defaults, types, ranges, and what help shows of them."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from kd_jax.runs.settings import changes, defaults, describe, freeze, merge, setting, spec, to_dict


@spec
class Inner:
    rate: float = setting(0.1, "learning rate", above=0.0)
    name: str = setting("adam", "optimiser", one_of=("adam", "sgd"))
    limit: float | None = setting(None, "norm to clip at; none for no limit", above=0.0)


@spec
class Outer:
    count: int = setting(3, "how many", at_least=1)
    ids: tuple[int, ...] = setting((), "token ids", at_least=0)
    shares: tuple[float, ...] = setting((0.5,), "shares", at_least=0.0, at_most=1.0)
    on: bool = setting(False, "whether")
    arms: dict[str, Any] = setting({}, "arms by name")
    inner: Inner = setting(Inner(), "optimisation")


def test_defaults_are_those_of_the_declaration():
    config = defaults(Outer)
    assert freeze(Outer, config) == Outer()
    assert config.inner.rate == 0.1 and config.inner.limit is None
    config.inner.limit = 2.0  # a placeholder has a type
    with pytest.raises(TypeError):
        config.inner.limit = "x"


def test_values_of_a_config():
    config = defaults(Outer)
    config.update(count=5, ids=(1, 2), shares=(1, 0.25))
    config.inner.update(rate=1, name="sgd")
    found = freeze(Outer, config)
    assert (found.count, found.ids, found.shares) == (5, (1, 2), (1.0, 0.25))
    assert found.inner == Inner(rate=1.0, name="sgd") and isinstance(found.inner.rate, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.count = 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"count": 0}, "config.count=0 must be at least 1"),
        ({"count": 1.0}, "config.count: 1.0 must be int"),
        ({"count": True}, "config.count: True must be int"),
        ({"ids": (1.7,)}, "config.ids: 1.7 must be int"),
        ({"ids": (-1,)}, "config.ids=-1 must be at least 0"),
        ({"ids": 3}, "config.ids=3 must be a tuple"),
        ({"shares": (0.5, 2.0)}, "config.shares=2.0 must be at least 0.0 and at most 1.0"),
        ({"shares": (float("nan"),)}, "config.shares=nan"),
        ({"cuont": 2}, "config.cuont is not a setting; did you mean config.count?"),
        ({"inner": {"rate": float("inf")}}, "config.inner.rate=inf"),
        ({"inner": {"name": "adm"}}, "config.inner.name='adm' must be one of adam, sgd"),
        ({"inner": {"b3": 1.0}}, "config.inner.b3 is not a setting"),
    ],
)
def test_a_wrong_value_is_named(changes, words):
    with pytest.raises(ValueError, match="^" + words.replace("?", r"\?")):
        freeze(Outer, ConfigDict(changes))


def test_a_spec_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="rate=0.0 must be above 0.0"):
        Inner(rate=0.0)


def test_rows_for_help():
    rows = {row.key: row for row in describe(Outer)}
    assert list(rows) == [
        "config.count", "config.ids", "config.shares", "config.on", "config.arms", "config.inner.rate",
        "config.inner.name", "config.inner.limit",
    ]  # fmt: skip
    assert rows["config.inner.limit"][1:] == ("float or none", None, "above 0.0", "norm to clip at; none for no limit")
    assert rows["config.ids"].type == "tuple of int" and rows["config.inner.name"].range == "one of adam, sgd"


def test_as_plain_values():
    assert to_dict(Outer(count=2))["inner"] == {"rate": 0.1, "name": "adam", "limit": None}


Differing = changes(Outer)


@spec
class Part:
    other: Differing = setting(Differing(), "what is different in it")


def test_changes_are_put_over_others():
    config = defaults(Part)
    assert merge(Outer(count=5), freeze(Part, config).other, "config.other") == Outer(count=5)
    config.other.update(shares=(0.25,), on=True)
    assert merge(Outer(count=5), freeze(Part, config).other, "config.other") == Outer(count=5, shares=(0.25,), on=True)
    with pytest.raises(TypeError):
        config.other.count = "three"  # a placeholder has a type
    config.other.count = 0
    with pytest.raises(ValueError, match="^config.other.count=0 must be at least 1"):
        merge(Outer(), freeze(Part, config).other, "config.other")
