"""Which kind of attention "auto" is, by device and shape. (The kinds' numbers: test_decoder, test_splash.)"""

import jax
import jax.numpy as jnp
import pytest

from kd_jax.lm.model import attention


@pytest.mark.parametrize(
    "backend,dtype,width,length,packed,kind",
    [
        ("gpu", "bfloat16", 64, 32, False, "cudnn"),
        ("gpu", "bfloat16", 64, 32, True, "cudnn"),
        ("gpu", "float16", 64, 31, False, "cudnn"),
        ("gpu", "float32", 64, 32, False, None),
        # beyond these cuDNN raises: heads of other widths, and a mask for an odd number of positions
        ("gpu", "bfloat16", 20, 32, False, None),
        ("gpu", "bfloat16", 256, 32, False, None),
        ("gpu", "bfloat16", 64, 31, True, None),
        ("cpu", "bfloat16", 64, 32, False, None),
    ],
)
def test_auto_on_a_gpu(backend, dtype, width, length, packed, kind, monkeypatch):
    taken = []

    def library(q, *_, implementation, mask, **__):
        # no mask at all where a row is one sequence: with one, cuDNN adds a bias to all scores
        assert (mask is not None) == packed
        taken.append(implementation)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    q, k, v = (jax.ShapeDtypeStruct((2, length, heads, width), dtype) for heads in (4, 2, 2))
    segments = jnp.ones((2, length), int) if packed else None
    jax.eval_shape(lambda *arrays: attention.causal(*arrays, segments), q, k, v)
    assert taken == [kind] * (kind is not None)
