"""With JAX's 64-bit types on: the same numbers, in the dtypes that are stated."""

import json

import pytest

from tests.lm.weights.checkpoints import run_python

SCRIPT = """
    import sys, json, jax, jax.numpy as jnp, numpy as np
    from kd_jax.lm import model
    from kd_jax.lm.model import PRESETS, kv_cache

    a = PRESETS["tiny"]
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape) / 7, jnp.float32), model.abstract(a))
    tokens = random.randint(0, a.vocab_size, (1, 70))
    whole = jax.jit(model.forward, static_argnums=1)(params, a, tokens)
    extend = jax.jit(model.extend, static_argnums=1)
    cache = model.empty_cache(a, 1, 64)
    hidden, cache = extend(params, a, cache, tokens[:, :63], np.arange(63)[None])
    pages = kv_cache.paged(cache, 1, 2, 4, 128)
    before = pages
    out = [np.asarray(hidden[:, -1])]
    for at in (63, 64):
        positions = jnp.full(2, at, jnp.int32)
        pages = kv_cache.open_pages(pages, positions)
        hidden, pages = extend(params, a, pages, np.repeat(tokens[:, at : at + 1], 2, 0), positions[:, None])
        out.append(np.asarray(hidden[:1, 0]))
    pages = kv_cache.release(pages, jnp.array([True, False]), 1)
    pages = kv_cache.resize(kv_cache.keep(pages, jnp.array([[1]])), 3)
    logits = model.logits(params, a, hidden)
    gradient = jax.grad(lambda params: (model.forward(params, a, tokens) ** 2).sum())(params)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves((whole, hidden, logits, gradient, pages.keys, pages.values))}
    assert [leaf.dtype for leaf in pages[2:]] == [leaf.dtype for leaf in before[2:]] == [jnp.int32] * 3
    np.testing.assert_allclose(np.concatenate(out)[:, :], whole[0, 62:65], rtol=0, atol=2e-5)
    print(json.dumps([sorted(dtypes), np.asarray(whole, np.float64)[0, :, 0].tolist()]))
"""


@pytest.mark.long
def test_the_same_numbers_with_x64():
    (dtypes, ours), (more_dtypes, theirs) = (
        json.loads(run_python(SCRIPT, JAX_ENABLE_X64=flag).splitlines()[-1]) for flag in ("0", "1")
    )
    assert dtypes == more_dtypes == ["float32"]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
