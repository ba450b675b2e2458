"""What tests of several files use."""

import pytest

from kd_jax.runs import cache


def pytest_configure():
    # Many tests run the same programs, and nearly all the time of most is their compilation.
    cache.enable_compilation_cache()


@pytest.fixture(scope="module")
def one_torch_thread():
    """Torch's threads wait for each other by spinning: with JAX's beside them, or a busy machine, minutes go by."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """The folder of a small corpus that is easily learnt, as text for what goes to other processes."""
    from tests.lm.training.test_loop import make_corpus

    folder = tmp_path_factory.mktemp("corpus") / "c"
    make_corpus(folder)
    return str(folder)
