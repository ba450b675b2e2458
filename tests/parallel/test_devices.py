"""What --device means."""

import pytest

from kd_jax.parallel import devices


@pytest.mark.parametrize(
    ("text", "count", "memory", "tera"),
    [
        ("8xH100", 8, 80, 989),
        ("h200", 1, 141, 989),
        ("1xA100-80GB", 1, 80, 312),
        ("8xB200", 8, 180, 2250),
        # chips, under both of their names
        ("v5e-64", 64, 16, 197),
        ("v5litepod-64", 64, 16, 197),
        ("v6e-256", 256, 32, 918),
        # TensorCores, two a chip
        ("v4-32", 16, 32, 275),
        ("v5p-128", 64, 95, 459),
    ],
)
def test_devices_by_name(text, count, memory, tera):
    found = devices.parse(text)
    assert (found.count, found.chip.memory, found.chip.bfloat16) == (count, memory, tera * 1e12)
    assert found.slices == 1


@pytest.mark.parametrize(
    ("text", "slices", "count", "gigabits"),
    [
        ("4x v5e-64", 4, 256, 6.4e3 / 256),
        ("2xv6e-8", 2, 16, 25.6e3 / 256),
        ("2x v5p-16", 2, 16, 50),
        ("2x 8xH100", 2, 16, 400),
        ("4x4xa100-80gb", 4, 16, 200),
    ],
)
def test_several_slices_and_their_network(text, slices, count, gigabits):
    found = devices.parse(text)
    assert (found.slices, found.count) == (slices, count)
    assert 8 * found.chip.network / 1e9 == pytest.approx(gigabits)


@pytest.mark.parametrize(
    "text", ["8xH101", "A100", "v5e", "v5-8", "v4litepod-8", "0xH100", "8xH100x", "", "2x8xv6e-8", "2xCPU", "2x 1xCPU"]
)
def test_an_unknown_device_lists_those_that_are_known(text):
    with pytest.raises(ValueError) as raised:
        devices.parse(text)
    said = str(raised.value)
    assert f"--device={text} is not known" in said
    assert all(name in said for name in (*devices.GPUS, *devices.TPUS, "1xCPU"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-63", "a v5e slice has 1, 4, 8, 16, 32, 64, 128, 256 chips, not 63"),
        ("v4-12", "8, 16, ... TensorCores, not 12"),
        ("v5p-9", "TensorCores, not 9"),
    ],
)
def test_slices_that_do_not_exist(text, message):
    with pytest.raises(ValueError, match=message):
        devices.parse(text)


@pytest.mark.parametrize(("mfu", "price", "name"), [(0.0, None, "mfu"), (1.1, 1.0, "mfu"), (0.4, -1.0, "price")])
def test_numbers_that_cannot_be(mfu, price, name):
    with pytest.raises(ValueError, match=f"--{name}"):
        devices.target("8xH100", mfu, price)


def test_this_machine():
    found = devices.parse("1xCPU")
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemTotal:"))
    assert found.chip.cpu and found.count == 1
    assert abs(found.chip.memory * 2**20 / kib - 1) < 0.01


def test_float32_on_a_tpu_is_six_products_of_bfloat16():
    assert devices.TPUS["v4"].float32 * 6 == pytest.approx(275e12)
