"""The log of a training: rows of its metrics.jsonl, a progress bar, and trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_jax.lm.training.update import Metrics
from kd_jax.parallel import distributed
from kd_jax.runs import progress, trackers
from kd_jax.runs.run import Clock
from kd_jax.storage.files import append_rows, read_rows, write_rows

# The fields that every row has.
ROW = {"kind": str, "step": int}


class Log:
    """Rows of metrics.jsonl, the progress bar and the trackers of one training; only process 0 writes.

    Args:
        folder: of the training.
        tags: fields of every row, "name" among them.
        first: updates that are finished; rows beyond them were written before a kill, are removed, and come again.
        total: updates in all.
        log_every: updates between rows.
        names: trackers, see kd_jax.runs.trackers.
        tokens_at_ceiling: tokens per second at the device's measured peak rate.
        clock: of the training, for the share of time that rollouts take.
        quiet: no progress bar.
    """

    def __init__(
        self, folder: Path, tags: dict[str, Any], first: int, total: int, log_every: int, names: Sequence[str], *,
        tokens_at_ceiling: float, clock: Clock, quiet: bool,
    ):  # fmt: skip
        self._path, self._tags, self._total, self._every = folder / "metrics.jsonl", tags, total, log_every
        self._leads = distributed.leads()
        if self._leads:
            # A kill may have cut the last row short, and rows beyond the checkpoint come again.
            write_rows(self._path, [row for row in read_rows(self._path, ROW, cut=True) if row["step"] <= first])
        self._track = trackers.Tracker(names if self._leads else (), folder)
        self._ceiling, self._clock = tokens_at_ceiling, clock
        # tokens learnt and computed, time, and seconds of rollouts at the previous row; the rate that the bar shows
        self._computed, self._previous, self._rate = 0, None, ""
        self._bar = progress.bar(tags["name"], first, total, "update", quiet=quiet)

    def update(self, done: int, tokens: int, computed: int, metrics: Metrics, on_policy: bool | None = None) -> None:
        """Logs an update.

        Args:
            done: its number, from 1.
            tokens: learnt from so far.
            computed: tokens of this update, those of prompts included and padding not.
            metrics: its metrics, as floats.
            on_policy: whether it learnt from the student's own samples; None where no update does.
        """
        self._bar.update(1)
        self._computed += computed
        if done % self._every and done != self._total:
            return
        now, speed, utilisation, share = time.perf_counter(), None, None, None
        rollouts = self._clock.seconds["rollouts"]
        # The first row has no rate: its time includes the compilation.
        if self._previous is not None:
            learnt, through, then, rolled = self._previous
            speed, share = (tokens - learnt) / (now - then), (rollouts - rolled) / (now - then)
            # The share of the FLOPs that the device can do is the model FLOPs utilisation (MFU).
            utilisation = (self._computed - through) / (now - then) / self._ceiling
        self._previous = tokens, self._computed, now, rollouts
        values = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "learning_rate": metrics.learning_rate}
        values |= {"tokens_per_second": speed, "share_of_ceiling": utilisation}
        if on_policy is not None:
            values |= {"on_policy": on_policy, "share_of_rollouts": share}
        self._rate = self._rate if speed is None else f", {speed:.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {metrics.loss:.3f}{self._rate}", refresh=False)
        self._row("training", done, values | metrics.statistics | {"tokens": tokens})

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Logs the validation loss, as "loss", and its statistics.

        The perplexity is of the cross-entropy: the loss itself unless the statistics have one.

        Args:
            done: updates so far.
            values: the loss and its statistics by name, nats per token.
        """
        nats = values.get("cross_entropy", values["loss"])
        perplexity = math.exp(nats) if nats < 709 else math.inf  # e^710 is beyond float64
        self._row("validation", done, {"loss": values["loss"], "perplexity": perplexity} | values)
        self._previous = None  # the time until the next row has the validation in it

    def _row(self, kind: str, done: int, values: dict[str, Any]) -> None:
        if self._leads:
            append_rows(self._path, [{"kind": kind, **self._tags, "step": done, **values}])
        self._track(done, {f"{kind}/{name}": value for name, value in values.items() if value is not None})

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._bar.close()
        self._track.finish()
