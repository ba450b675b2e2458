"""The students of a run by how they learn: its arms, as the config says them.

direct           the text of p*
tau-0.8, ...     config.taus: the teacher's text at that sample_temperature (policy "sequence")
any other name   config.arms: what differs from config.distill. Without any, and with a config.distill.policy that
                 is not "sequence", there is one, named after the policy.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from kd_jax.lm.distill import loss

DATA = ("p_star", "samples", "mix")
TRAIN = "p_star/train"
# Names of other things in a run folder, or that a report takes for something else.
_TAKEN = ("direct", "distilled", "teacher", "p_star", "samples", "evaluation", "model")
_LOSS = ("divergence", "parameter", "loss_temperature", "teacher_temperature", "hard_weight")
# The knobs that what a student learns is a function of, by policy.
_KNOBS = {
    "sequence": (),
    "online": (*_LOSS, "data", "mix", "teacher_dtype"),
    "on_policy": (
        *_LOSS, "data", "mix", "teacher_dtype", "on_policy_fraction", "prompt_length", "student_sample_temperature",
    ),
    "offline": (*_LOSS, "data", "mix", "tail"),
}  # fmt: skip


class Samples(NamedTuple):
    """How the teacher is sampled.

    Attributes:
        sample_temperature: tau.
        top_k, top_p: None for off.
    """

    sample_temperature: float
    top_k: int | None = None
    top_p: float | None = None

    @property
    def label(self) -> str:
        parts = [f"tau-{self.sample_temperature:g}"]
        parts += [] if self.top_k is None else [f"top_k-{self.top_k}"]
        parts += [] if self.top_p is None else [f"top_p-{self.top_p:g}"]
        return "-".join(parts)

    @property
    def name(self) -> str:
        """Of the stage that makes them."""
        return f"samples/{self.label}"


class Recording(NamedTuple):
    """What is recorded of the teacher: how many ids, in which form, and the teacher's dtype."""

    top_k: int
    log_prob_format: str
    teacher_dtype: str

    def name(self, corpus: str) -> str:
        """Of the stage that records it of a corpus."""
        exact = "" if self.log_prob_format == "uint16" else f"-{self.log_prob_format}"
        return f"top_k-{self.top_k}{exact}/{corpus}"


class Arm(NamedTuple):
    """Students that learn in one way.

    Attributes:
        name: of the arm; its students are NAME/seed-SEED.
        kind: what rows call it: "direct", "distilled" (by config.taus), or the name.
        policy: "sequence" (of text alone, whosever it is) or one of kd_jax.lm.distill.loss.POLICIES.
        samples: the teacher's samples in what is learnt; None where there are none.
        p_star: whether text of p* is in it.
        recording: offline.
        settings: how the teacher's distribution is learnt; None where text alone is.
        knobs: what rows say of it, and what the students' stages are named by.
    """

    name: str
    kind: str
    policy: str = "sequence"
    samples: Samples | None = None
    p_star: bool = False
    recording: Recording | None = None
    settings: loss.Settings | None = None
    knobs: dict[str, Any] = {}

    @property
    def tau(self) -> float | None:
        """The teacher's sample_temperature in what is learnt."""
        return None if self.samples is None else self.samples.sample_temperature

    @property
    def texts(self) -> tuple[str, ...]:
        """The stages whose corpora are learnt from: p*'s first, if both are."""
        return (TRAIN,) * self.p_star + (() if self.samples is None else (self.samples.name,))

    @property
    def rollouts(self) -> float:
        """The share of updates that learn from the student's own sequences."""
        return self.settings.on_policy_fraction if self.policy == "on_policy" else 0.0

    @property
    def corpora(self) -> tuple[str, ...]:
        """The same, with what was recorded of the teacher where that is learnt from."""
        return self.texts if self.recording is None else tuple(self.recording.name(text) for text in self.texts)


def arms(config) -> list[Arm]:
    """All arms of a run. Raises ValueError, naming the key, for one that cannot be."""
    found = [Arm("direct", "direct", p_star=True)]
    found += [Arm(f"tau-{tau:g}", "distilled", samples=Samples(tau)) for tau in config.taus]
    if not config.arms and config.distill.policy != "sequence":
        return [*found, _arm(config, config.distill.policy, {}, "config.distill")]
    for name, changes in config.arms.items():
        if name in _TAKEN or not re.fullmatch(r"[\w.@+-]+", name) or name.startswith(("tau-", "top_k-")):
            raise ValueError(f"config.arms: {name!r} cannot name an arm")
        # where the teacher lies is the same for all
        unknown = sorted(set(changes) - (set(config.distill) - {"teacher_mesh"}))
        if unknown:
            raise ValueError(f"config.arms.{name}.{unknown[0]} is not a setting of config.distill")
        found.append(_arm(config, name, dict(changes), f"config.arms.{name}"))
    return found


def _arm(config, name: str, changes: dict[str, Any], label: str) -> Arm:
    values = {**config.distill, **changes}
    if values["policy"] not in _KNOBS:
        raise ValueError(f"{label}.policy={values['policy']!r} is not one of {', '.join(_KNOBS)}")
    if values["data"] not in DATA:
        raise ValueError(f"{label}.data={values['data']!r} is not one of {', '.join(DATA)}")
    policy = values["policy"]
    data = "samples" if policy == "sequence" else values["data"]
    samples = None if data == "p_star" else _samples(values, label)
    knobs = {key: values[key] for key in _KNOBS[policy] if key != "mix" or data == "mix"}
    if values["teacher_temperature"] is None:  # what is off is not said
        knobs.pop("teacher_temperature", None)
    recording = _recording(values, label) if policy == "offline" else None
    settings = None
    if policy != "sequence":
        names = ("prompt_length", "student_sample_temperature", "on_policy_fraction", "rollout_batch_size", "tail")
        how = {key: values[key] for key in (*_LOSS, *names)}
        try:
            settings = loss.Settings(policy, mix=values["mix"] if data == "mix" else 0.0, **how)
        except ValueError as error:
            raise ValueError(str(error).replace("distill.", f"{label}.", 1)) from error
    knobs = {"policy": policy} | knobs
    names = () if recording is None else ("record_top_k", "log_prob_format", "teacher_dtype")
    knobs |= {key: values[key] for key in names}
    return Arm(name, name, policy, samples, data != "samples", recording, settings, knobs)


def _samples(values: dict[str, Any], label: str) -> Samples:
    tau, k, p = values["sample_temperature"], values["top_k"], values["top_p"]
    if not 0 < tau < float("inf"):
        raise ValueError(f"{label}.sample_temperature={tau} must be above 0 and finite")
    if k < 0:
        raise ValueError(f"{label}.top_k={k} must be 0 (off) or above")
    if not 0 < p <= 1:
        raise ValueError(f"{label}.top_p={p} must be above 0 and at most 1 (off)")
    return Samples(tau, k or None, p if p < 1 else None)


def _recording(values: dict[str, Any], label: str) -> Recording:
    if values["record_top_k"] < 1:
        raise ValueError(f"{label}.record_top_k={values['record_top_k']} must be at least 1")
    if values["log_prob_format"] not in ("uint16", "float32"):
        raise ValueError(f"{label}.log_prob_format={values['log_prob_format']!r} is neither uint16 nor float32")
    return Recording(values["record_top_k"], values["log_prob_format"], values["teacher_dtype"])
