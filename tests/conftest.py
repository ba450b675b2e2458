"""What tests of several files use."""

import collections

import pytest

from kd_jax.runs import cache


def pytest_configure():
    # Many tests run the same programs, and nearly all the time of most is their compilation.
    cache.enable_compilation_cache()


def pytest_collection_modifyitems(items):
    # @pytest.mark.fast(n): of the cases of a test, only the first n are among the fast ones
    cases = collections.Counter()
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.slow)
        mark = item.get_closest_marker("fast")
        if mark is not None:
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


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
