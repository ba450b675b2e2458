"""What is read in a lowered program, on programs that are small enough to know what stands in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerators import stablehlo

F32 = jax.ShapeDtypeStruct((4, 8), np.float32)


def text(function, *arguments, platform="tpu", **options):
    return jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_arrays_of_64_bits():
    with jax.enable_x64(True):
        wide = text(lambda x: x * 2, jax.ShapeDtypeStruct((3, 5), np.float64))
    assert "f64[3,5]" in stablehlo.float64(wide)
    assert not stablehlo.float64(text(lambda x: x * 2, F32))


@pytest.mark.parametrize("precision,rounded", [(None, 1), ("default", 1), ("highest", 0)])
def test_products_of_float32(precision, rounded):
    product = text(lambda x: jnp.matmul(x, x.T, precision=precision), F32)
    assert stablehlo.rounded_products(product) == ["f32[4,8] x f32[8,4]"] * rounded


def test_products_of_bfloat16_need_no_precision():
    half = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    assert not stablehlo.rounded_products(text(lambda x: x @ x.T, half))


def test_products_of_widened_bfloat16():
    half = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    widened = text(lambda x: jnp.matmul(x.astype(jnp.float32), x.T.astype(jnp.float32)), half)
    assert not stablehlo.rounded_products(widened)
    # one of the factors has more digits than bfloat16
    other = text(lambda x, y: jnp.matmul(x.astype(jnp.float32), y), half, jax.ShapeDtypeStruct((8, 4), np.float32))
    assert stablehlo.rounded_products(other) == ["f32[4,8] x f32[8,4]"]


def test_a_callback_in_a_loop():
    def body(_, x):
        jax.debug.callback(lambda value: None, x.sum())
        return x + 1

    # a callback needs its device, so it is lowered for this one
    assert stablehlo.host_calls(text(lambda x: jax.lax.fori_loop(0, 3, body, x), F32, platform="cpu"))
    assert not stablehlo.host_calls(text(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x + 1, x), F32))


def test_donated_arguments():
    def function(x, y, z):
        return x + 1, y + 1, z.sum()

    assert stablehlo.donated(text(function, F32, F32, F32)) == 0
    assert stablehlo.donated(text(function, F32, F32, F32, donate_argnums=(0, 1))) == 2


def test_the_widest_array():
    program = text(lambda x: (x[:, :, None] * jnp.ones(17)).sum(), F32)
    widest = stablehlo.widest(program, 17)
    assert (str(widest), widest.bytes) == ("f32[4,8,17]", 4 * 4 * 8 * 17)
    assert stablehlo.widest(program, 19) is None
