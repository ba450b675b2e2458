"""Sampling under JAX_ENABLE_X64, which mixtures are advised to run with: it runs, and draws the same."""

import jax
import numpy as np
import pytest

from kd_jax.lm import decode
from tests.lm.decode.test_sampler import SMALL, Model, model

OPTIONS = {"max_length": 12, "seed": 7, "batch_size": 4}


@pytest.mark.long
@pytest.mark.parametrize(
    "knobs",
    [{"sample_temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01}, {}],
)
def test_samples_are_the_same(knobs):
    of = Model(SMALL, jax.jit(model.init, static_argnums=1)(jax.random.key(0), SMALL), eos_ids=(5, 6, 90))
    expected = decode.generate(of, [3, 4], 9, **OPTIONS, **knobs)
    with jax.enable_x64(True):
        got = decode.generate(of, [3, 4], 9, **OPTIONS, **knobs)
        (part,) = list(decode.stream(of, [[3], [4, 5]], 2, **OPTIONS, **knobs))[-1:]
    for name, one, other in zip(("tokens", "lengths", "log_probs"), got, expected, strict=True):
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6, err_msg=name)
    assert part.tokens.dtype == np.int32 and part.log_probs.dtype == np.float32
