"""The arms of a run: groups of students by how they learn.

direct           the text of p*
tau-0.8, ...     config.taus: the teacher's text at that sample temperature
any other name   config.arms: what differs from config.distill. Without any, and with a config.distill.policy other than
                 "sequence", there is one, named after the policy.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from kd_jax.lm.decode.chosen_text import Text
from kd_jax.lm.distill.loss import DistillSpec
from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.runs.settings import freeze, to_dict

TRAIN = "p_star/train"
# Names of other things in a run folder, or of other rows of its metrics.
_TAKEN = ("direct", "distilled", "teacher", "p_star", "samples", "evaluation", "model")
_LOSS = ("divergence", "parameter", "loss_temperature", "teacher_temperature", "hard_weight")
# A teacher that runs may have another vocabulary; uld, which sorts probabilities, has a distance of its own.
_RUNS = (*_LOSS, "data", "mix", "teacher_dtype", "vocabulary")
_NOT_OF_ULD = {"divergence", "parameter"}
_OWN = ("on_policy_fraction", "prompt_length", "student_sample_temperature")
_RECORDED = ("record_top_k", "log_prob_format", "teacher_dtype")
# By policy, the settings that decide what a student learns; the sampler too where it learns the teacher's text.
_KNOBS = {
    "sequence": ("text_rows", "text_choice", "text_share"),
    "online": _RUNS,
    "on_policy": (*_RUNS, *_OWN),
    "offline": (*_LOSS, "data", "mix", "tail", *_RECORDED),
}


_DEFAULT = DistillSpec()


class Recording(NamedTuple):
    """What is recorded of the teacher: how many ids at a position, in which form, and the teacher's dtype."""

    top_k: int
    log_prob_format: str
    teacher_dtype: str

    def name(self, corpus: str) -> str:
        """The stage that records it for a corpus."""
        # The defaults need no ending.
        exact = "" if self.log_prob_format == _DEFAULT.log_prob_format else f"-{self.log_prob_format}"
        rounded = "" if self.teacher_dtype == _DEFAULT.teacher_dtype else f"-of-{self.teacher_dtype}"
        return f"top_k-{self.top_k}{exact}{rounded}/{corpus}"


class Arm(NamedTuple):
    """Students that learn in one way.

    Attributes:
        name: of the arm.
        kind: what rows call it: "direct", "distilled" (by config.taus), or the name.
        policy: one of kd_jax.lm.distill.loss.POLICIES; "sequence" for all that learn text alone.
        sampler: how the teacher's text was sampled; None where none is learnt.
        text: which of the teacher's samples are learnt.
        p_star: whether p*'s text is learnt.
        distill: how the teacher's distribution is learnt; None where text alone is.
        knobs: the settings by which it differs from other arms, for rows and for the stages of its students.
    """

    name: str
    kind: str
    policy: str = "sequence"
    sampler: SamplerSpec | None = None
    text: Text = Text()
    p_star: bool = False
    distill: DistillSpec | None = None
    knobs: dict[str, Any] = {}

    @property
    def tau(self) -> float | None:
        """The teacher's sample temperature in what is learnt."""
        return None if self.sampler is None else self.sampler.sample_temperature

    @property
    def texts(self) -> tuple[str, ...]:
        """The stages whose corpora are learnt from; p*'s first, if there are two."""
        return (TRAIN,) * self.p_star + (() if self.sampler is None else (samples_stage(self.sampler, self.text),))

    @property
    def recording(self) -> Recording | None:
        """What is recorded of the teacher; None unless the policy is offline."""
        if self.policy != "offline":
            return None
        return Recording(self.distill.record_top_k, self.distill.log_prob_format, self.distill.teacher_dtype)

    @property
    def corpora(self) -> tuple[str, ...]:
        """As `texts`; the stages with what was recorded of the teacher where that is learnt from."""
        return self.texts if self.recording is None else tuple(self.recording.name(text) for text in self.texts)

    @property
    def teacher_runs(self) -> bool:
        """Whether the teacher runs inside the updates."""
        return self.policy in ("online", "on_policy")

    @property
    def rollouts(self) -> float:
        """The share of updates that learn from the student's own samples."""
        return self.distill.on_policy_fraction if self.policy == "on_policy" else 0.0


def of_teacher(stage: str, teacher: int) -> str:
    """The name of a stage, or of a model, for one of several teachers.

    The first teacher's names say no number, so that a finished run can get more teachers and keep its stages.
    """
    if not teacher:
        return stage
    group, *rest = stage.split("/", 1)
    return "/".join([group, f"teacher-{teacher}", *rest])


def samples_stage(sampler: SamplerSpec, text: Text) -> str:
    """The stage that samples the teacher, or that chooses a text among its samples."""
    return f"samples/{sampler.label}" + (f"-{text.label}" if text.label else "")


def samples_of(spec: LmSpec, arm: Arm) -> str:
    """The stage that samples the teacher for an arm."""
    rows = arm.text.num_samples(spec.num_train, spec.num_validation) - spec.num_validation
    return samples_stage(arm.sampler, Text(rows=0 if rows == spec.num_train else rows))


def arms(spec: LmSpec) -> list[Arm]:
    """All arms of a run.

    Raises: ValueError, naming the key, for a name that is taken, an unknown setting, or one without effect.
    """
    # The direct student comes first: all others are compared with it.
    named = [Arm("direct", "direct", p_star=True)]
    named += [Arm(f"tau-{tau:g}", "distilled", sampler=SamplerSpec(sample_temperature=tau)) for tau in spec.taus]
    if spec.arms:
        for name, changes in spec.arms.items():
            # Names become folders, and must not be those of stages that config.taus makes.
            if name in _TAKEN or not re.fullmatch(r"[\w.@+-]+", name) or name.startswith(("tau-", "top_k-")):
                raise ValueError(f"config.arms: {name!r} cannot name an arm")
            named.append(_changed_arm(spec, name, dict(changes)))
    elif spec.distill.policy != "sequence":
        # without named arms, config.distill itself is one
        named.append(_arm(spec.distill.policy, spec.distill, spec.num_train))
    _check_effect(spec.distill, [arm for arm in named if arm.kind not in ("direct", "distilled")])
    return named


def _changed_arm(spec: LmSpec, name: str, changes: dict[str, Any]) -> Arm:
    base, label = spec.distill, f"config.arms.{name}"
    values = to_dict(base)
    if isinstance(changes.get("sampler"), dict):
        # Merged like all other settings: an arm names only what differs.
        changes["sampler"] = {**values["sampler"], **changes["sampler"]}
    distill = freeze(DistillSpec, {**values, **changes}, label)
    used = _used(distill)
    for key in changes:
        if key not in used and getattr(distill, key) != getattr(base, key):
            raise ValueError(f"{label}.{key} has no effect with policy={distill.policy!r} and data={distill.data!r}")
    return _arm(name, distill, spec.num_train)


def _arm(name: str, distill: DistillSpec, num_train: int) -> Arm:
    policy = distill.policy
    # Text alone of p* would be the direct arm.
    data = "samples" if policy == "sequence" else distill.data
    knobs = {key: getattr(distill, key) for key in _KNOBS[policy] if key != "mix" or data == "mix"}
    if distill.teacher_temperature is None:  # off: left out of rows and of keys
        knobs.pop("teacher_temperature", None)
    if distill.vocabulary == "same":
        knobs.pop("vocabulary", None)
    elif distill.vocabulary == "uld":
        knobs = {key: value for key, value in knobs.items() if key not in _NOT_OF_ULD}
    text = Text()
    if policy == "sequence":
        text = Text(distill.text_rows if distill.text_rows != num_train else 0, distill.text_choice, distill.text_share)
        knobs = {key: value for key, value in knobs.items() if value != getattr(_DEFAULT, key)}
    return Arm(
        name, name, policy, sampler=None if data == "p_star" else distill.sampler, text=text, p_star=data != "samples",
        distill=None if policy == "sequence" else distill, knobs={"policy": policy} | knobs,
    )  # fmt: skip


def _used(distill: DistillSpec) -> set[str]:
    """The settings that have an effect under the others."""
    used = {"policy", *_KNOBS[distill.policy]}
    if distill.policy == "sequence" or distill.data != "p_star":
        used.add("sampler")
    if distill.data != "mix":
        used.discard("mix")
    if distill.vocabulary == "uld" and distill.policy != "sequence":
        used -= _NOT_OF_ULD
    if distill.policy == "on_policy":
        # It has an effect, on rounding and memory, but makes no other arm.
        used.add("rollout_batch_size")
    return used


def _check_effect(base: DistillSpec, named: list[Arm]) -> None:
    """Raises ValueError for a setting of config.distill that was changed and that no arm uses."""
    # Used by any arm is enough: arms differ in policy, and each policy reads other settings.
    used = {"policy"} | {key for arm in named for key in _used(arm.distill or base)}
    default = DistillSpec()
    for field in dataclasses.fields(DistillSpec):
        if field.name not in used and getattr(base, field.name) != getattr(default, field.name):
            raise ValueError(
                f"config.distill.{field.name}={getattr(base, field.name)!r} has no effect: no arm uses it "
                "(students of config.taus learn the teacher's text alone)"
            )
