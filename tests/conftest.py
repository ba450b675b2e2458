"""What tests of several files use."""

import pytest


@pytest.fixture(scope="module")
def one_torch_thread():
    """Torch's threads wait for each other by spinning: with JAX's beside them, or a busy machine, minutes go by."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
