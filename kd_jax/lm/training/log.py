"""What a training says while it goes on: rows of its metrics.jsonl, a progress bar, and trackers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kd_jax.lm.training import step
from kd_jax.parallel import distributed
from kd_jax.runs import trackers
from kd_jax.runs.run import Clock
from kd_jax.storage.files import append_rows, read_rows, write_rows

# What every row of it has.
ROW = {"kind": str, "step": int}


class Log:
    """Rows of metrics.jsonl, the progress bar, and whatever else the settings ask for; process 0's alone.

    Args:
        folder: of the training.
        tags: fields of every row, "name" among them.
        first: updates that are done already; rows beyond them come again, and are removed.
        total: updates in all.
        log_every, trackers: see kd_jax.lm.training.Settings.
        tokens_at_ceiling: tokens a second that the device's best rate would be.
        clock: of the training, for the share of time that went into rollouts.
        quiet: no progress bar.
    """

    def __init__(
        self, folder: Path, tags: dict[str, Any], first: int, total: int, log_every: int, names: Sequence[str], *,
        tokens_at_ceiling: float, clock: Clock, quiet: bool,
    ):  # fmt: skip
        self._path, self._tags, self._total, self._every = folder / "metrics.jsonl", tags, total, log_every
        self._leads = distributed.leads()
        if self._leads:
            write_rows(self._path, [row for row in read_rows(self._path, ROW, cut=True) if row["step"] <= first])
        self._track = trackers.start(names if self._leads else (), folder)
        self._ceiling, self._clock = tokens_at_ceiling, clock
        # tokens, time, and seconds of rollouts at the row before; the speed that was shown
        self._before, self._speed = None, ""
        often = 0.1 if sys.stderr.isatty() else 30  # into a log file, a line now and then
        self._bar = tqdm(
            total=total, initial=first, unit="update", desc=tags["name"], mininterval=often, dynamic_ncols=True,
            disable=quiet or not self._leads,
        )  # fmt: skip

    def update(self, done: int, tokens: int, metrics: step.Metrics, on_policy: bool | None = None) -> None:
        """An update is done; `on_policy` says whether it learnt from the student's own sequences."""
        self._bar.update(1)
        if done % self._every and done != self._total:
            return
        now, speed, share = time.perf_counter(), None, None
        rollouts = self._clock.seconds["rollouts"]
        if self._before is not None:
            speed = (tokens - self._before[0]) / (now - self._before[1])
            share = (rollouts - self._before[2]) / (now - self._before[1])
        self._before = tokens, now, rollouts
        values = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "learning_rate": metrics.learning_rate}
        # of the first row the time is unknown: it has the compilation in it
        values |= {"tokens_per_second": speed, "share_of_ceiling": speed and speed / self._ceiling}
        if on_policy is not None:
            values |= {"on_policy": on_policy, "share_of_rollouts": share}
        self._speed = self._speed if speed is None else f", {speed:.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {metrics.loss:.3f}{self._speed}", refresh=False)
        self._row("training", done, values | metrics.statistics | {"tokens": tokens})

    def validation(self, done: int, found: dict[str, float]) -> None:
        """The validation loss, as "loss", and its statistics; without a cross-entropy among them the loss is one."""
        perplexity = math.exp(found.get("cross_entropy", found["loss"]))
        self._row("validation", done, {"loss": found["loss"], "perplexity": perplexity} | found)
        self._before = None  # the next row's time would have the validation in it

    def _row(self, kind: str, done: int, values: dict[str, Any]) -> None:
        if self._leads:
            append_rows(self._path, [{"kind": kind, **self._tags, "step": done, **values}])
        self._track(done, {f"{kind}/{name}": value for name, value in values.items() if value is not None})

    def close(self) -> None:
        self._bar.close()
