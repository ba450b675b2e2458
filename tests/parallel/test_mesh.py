"""The order of devices in a mesh over several slices; sizes and partitions: tests/lm/model/test_decoder.py."""

import dataclasses

import jax
import numpy as np
import pytest

from kd_jax.parallel import mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device of a TPU slice."""

    id: int
    slice_index: int
    process_index: int = 0


def slices_of(made):
    return np.vectorize(lambda device: device.slice_index)(made.devices)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 4), (-1, 4, 1)])
def test_only_data_spans_slices(sizes):
    # in turn, as where the processes of two slices have started by chance
    two = [Device(i, slice_index=i % 2) for i in range(8)]
    made = mesh.make(*sizes, two)
    for group in slices_of(made).reshape(made.shape["data"], -1):
        assert len(set(group)) == 1
    # one order for all sizes, and neighbours in a slice stay neighbours
    assert [device.id for device in made.devices.flat] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (1, 2, 4), (-1, 8, 1)])
def test_fsdp_and_tensor_that_would_span_slices(sizes):
    two = [Device(i, slice_index=i // 4) for i in range(8)]
    with pytest.raises(
        ValueError, match=r"fsdp x tensor = 8 devices do not fit into a slice .* the 8 devices are in 2 of them"
    ):
        mesh.make(*sizes, two)
    assert mesh.make(*sizes, two, slices=1).size == 8


def test_slices_that_are_declared():
    eight = jax.devices()[:1] * 8
    assert dict(mesh.make(fsdp=4, devices=eight, slices=2).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for fsdp, slices in ((8, 2), (4, 4), (2, 8)):
        with pytest.raises(ValueError, match=f"= {fsdp} devices do not fit .* the 8 devices are in {slices} of them"):
            mesh.make(fsdp=fsdp, devices=eight, slices=slices)


def test_slices_of_different_sizes():
    # five devices and three: in pairs, one would have a device of each
    uneven = [Device(i, slice_index=int(i >= 5)) for i in range(8)]
    assert mesh.make(devices=uneven).size == 8
    with pytest.raises(ValueError, match="do not fit"):
        mesh.make(fsdp=2, devices=uneven)
