"""Chunks of positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses import head


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, chunk, chunks, length",
    [
        ((8, 48), 256, 2, 24), ((6, 48), 256, 2, 24), ((8, 48), 8 * 48, 1, 48), ((8, 49), 256, 2, 25),
        ((49,), 16, 4, 13), ((300, 5), 256, 5, 1), ((2, 3, 7), 13, 4, 2), ((3, 11), None, 1, 11),
    ],
)  # fmt: skip
def test_chunks_are_of_equal_length(shape, chunk, chunks, length):
    values = np.arange(np.prod(shape) * 2).reshape(*shape, 2)
    size, (pieces, whole) = head.cut((jnp.asarray(values), jnp.ones(shape)), shape, chunk)
    assert size == shape[-1] and pieces.shape == (chunks, *shape[:-1], length, 2)
    # no more than one position less than a chunk's number is filled up
    assert chunks * length - size < chunks
    assert whole.sum() == np.prod(shape)
    np.testing.assert_array_equal(head.join(pieces, size, len(shape) - 1), values)
