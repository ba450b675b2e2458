"""Progress bars on stderr, with rate and remaining time, shown by process 0 only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from kd_jax.parallel import distributed


def bar(label: str, first: int, total: int, unit: str, *, quiet: bool = False) -> tqdm:
    """A progress bar.

    Args:
        label: text before the bar.
        first, total: units done already, and in all.
        unit: what is counted, in the singular.
        quiet: show nothing.
    """
    # a log file gets a line every half minute
    often = 0.1 if sys.stderr.isatty() else 30
    # Tokens are counted in millions, which a bar shows as M; samples and updates as they are.
    scale = unit == "token"
    return tqdm(
        desc=label, initial=first, total=total, unit=unit, unit_scale=scale, mininterval=often, dynamic_ncols=True,
        disable=quiet or not distributed.leads(),
    )  # fmt: skip


@contextlib.contextmanager
def sampling_bar(label: str, first: int, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of samples that also shows tokens a second; yields a function (new samples, new tokens).

    Args:
        label: text before the bar.
        first, total: samples done already, and in all.
    """
    start, made = time.perf_counter(), 0
    with bar(label, first, total, "sample") as shown:

        def progress(samples: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            shown.set_postfix_str(f"{made / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            shown.update(samples)

        yield progress


@contextlib.contextmanager
def no_dataset_bars() -> Iterator[None]:
    """Inside, the library datasets shows no progress bars of its own beside ours."""
    import datasets  # here, since most users of this file do without it, and it takes a second to import

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
