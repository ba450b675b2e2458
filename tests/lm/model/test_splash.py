"""The TPU's kernel, interpreted, beside attention that is computed block by block."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm.model import Compute, attention
from kd_jax.lm.model.attention import Rule


def arrays(rows=2, length=160, heads=4, kv_heads=2, width=16):
    random = np.random.default_rng(0)
    shapes = [(rows, length, count, width) for count in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


def packed(rows=2, length=160):
    """Three segments of different lengths in each row, and padding at the end."""
    ends = np.array([[40, 101, 150], [3, 90, 160]])[:rows]
    return (np.arange(length)[None, None] >= ends[..., None]).sum(axis=1) + 1


def value_and_gradients(kind, segments, rule, mesh=None):
    q, k, v = arrays()
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 160, 64), np.float32))

    def loss(q, k, v):
        out = attention.causal(q, k, v, segments, kind, rule=rule, mesh=mesh)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *gradients]


@pytest.mark.slow
@pytest.mark.parametrize(
    "segments,rule",
    [(packed(), Rule(scale=0.3, softcap=5.0, window=33)), (packed(), Rule()), (None, Rule())],
    ids=["packed, window and soft cap", "packed", "one sequence a row"],
)
def test_values_and_gradients(segments, rule):
    for ours, expected in zip(
        value_and_gradients("splash", segments, rule), value_and_gradients("blocked", segments, rule), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from kd_jax.lm.model.attention import Rule
from kd_jax.parallel import mesh as mesh_lib
from tests.lm.model.test_splash import packed, value_and_gradients

expected = value_and_gradients("splash", packed(), Rule())
# two KV heads over two devices; and over four, which do not divide them
for sizes in ((1, 2, 2), (1, 1, 4)):
    for ours, one in zip(value_and_gradients("splash", packed(), Rule(), mesh_lib.make(*sizes)), expected, strict=True):
        np.testing.assert_allclose(ours, one, atol=2e-5)
"""


@pytest.mark.long
def test_over_a_mesh():
    subprocess.run([sys.executable, "-c", DEVICES], check=True)


def test_it_needs_a_tpu_and_16_bits():
    with pytest.raises(ValueError, match="'splash' needs a TPU and dtype bfloat16"):
        Compute(dtype="bfloat16", attention="splash")


def test_auto_takes_it_on_a_tpu(monkeypatch):
    q, k, v = (array.astype(jnp.bfloat16) for array in arrays())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    lowered = jax.jit(lambda *a: attention.causal(*a, packed())).trace(q, k, v).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
