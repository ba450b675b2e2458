"""Progress bars on stderr, with the rate and the time that is left; only process 0 shows them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from kd_jax.parallel import distributed


def bar(label: str, first: int, total: int, unit: str, *, quiet: bool = False) -> tqdm:
    """A progress bar on stderr, with the rate and the time that is left."""
    # into a log file, a line's worth now and then
    often = 0.1 if sys.stderr.isatty() else 30
    scale = unit == "token"
    return tqdm(
        desc=label, initial=first, total=total, unit=unit, unit_scale=scale, mininterval=often, dynamic_ncols=True,
        disable=quiet or not distributed.leads(),
    )  # fmt: skip


@contextlib.contextmanager
def sampling_bar(label: str, first: int, total: int) -> Iterator[Callable[[int, int], None]]:
    start, made = time.perf_counter(), 0
    with bar(label, first, total, "sample") as shown:

        def progress(samples: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            shown.set_postfix_str(f"{made / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            shown.update(samples)

        yield progress
