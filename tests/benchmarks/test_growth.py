"""The benchmark of how cost grows: its exponents, what it calls memory, and its figure."""

import jax
import numpy as np
import pytest

from benchmarks import growth


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponents_of_power_laws(power):
    sizes = [8, 32, 64, 512]
    assert growth.exponents(sizes, [3 * size**power for size in sizes]) == pytest.approx((power, power))


def test_fixed_costs_lower_an_exponent_and_the_last_step_least():
    sizes = [1, 4, 16, 64]
    slope, last = growth.exponents(sizes, [10 + size for size in sizes])
    # log(74 / 26) / log(4)
    assert last == pytest.approx(0.7545, abs=1e-4) and 0 < slope < last


def test_costs_of_zero_are_left_out():
    assert growth.exponents([1, 2, 4, 8], [0, 5, 5, 5]) == pytest.approx((0, 0))


@pytest.mark.slow
def test_memory_is_beside_the_inputs():
    work = growth.loss(tokens=32, vocabulary=512)
    value, gradients = jax.block_until_ready(work.run())
    assert np.isfinite(value) and [gradient.shape for gradient in gradients] == [(32, 128), (512, 128)]
    inputs, outputs = 2 * 4 * 128 * (32 + 512), 4 + 4 * 128 * (32 + 512)
    # gradients, a float32 sum of the head's, and logits of both models
    assert outputs <= work.bytes <= inputs + outputs + 4 * 4 * 32 * 512


def test_the_figure_has_a_panel_for_each_row(tmp_path):
    costs = {"seconds": [1, 2, 3.9], "bytes": [4, 4, 5]}
    rows = [{"program": "p", "knob": "k", "sizes": [1, 2, 4], "fixed": "", "costs": costs} for _ in range(8)]
    growth.figure(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
