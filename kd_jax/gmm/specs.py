"""The settings of the mixture experiments, each declared once; configs/gmm*.py change their defaults.

Ranges of one setting are checked by its declaration, and what depends on two settings in `__post_init__`, so that a
spec that exists can run.
"""

from __future__ import annotations

import numpy as np

from kd_jax.gmm import em, gradient_fit
from kd_jax.gmm.gradient_fit import Divergence
from kd_jax.runs.settings import setting, spec

# Knobs of the student's loss: value -> divergence; its ValueError is the value's range.
DIVERGENCES = {
    "jensen_shannon": gradient_fit.jensen_shannon,
    "skew_forward_kl": gradient_fit.skew_forward_kl,
    "skew_reverse_kl": gradient_fit.skew_reverse_kl,
}


def _check_different(of: object, *names: str) -> None:
    """ValueError for a setting with a value twice: its students would count twice in every error."""
    for name in names:
        if len(set(getattr(of, name))) < len(getattr(of, name)):
            raise ValueError(f"{name}={getattr(of, name)} has a value twice")


@spec
class SweepSpec:
    """What all experiments with mixtures have."""

    seed: int = setting(0, "the first seed; the others count up from it", at_least=0, below=2**32)
    seeds: int = setting(64, "number of seeds, each with data and a teacher of its own", at_least=1)
    smoke: bool = setting(False, "a run that only shows that the program works: its page draws no conclusions")
    dim: int = setting(2, "dimensions", at_least=2)
    separation: float = setting(1.0, "distance between neighbouring modes of p*", above=0)
    num_data: int = setting(100, "draws of p* that the teacher and the direct student are fitted to", at_least=1)
    teacher_components: int = setting(4, "components of the teacher", at_least=1)
    student_components: int = setting(1, "components of each student", at_least=1)
    num_distill: int = setting(1000, "draws of the teacher that a distilled student is fitted to", at_least=1)
    num_precision: int = setting(2000, "draws of a student for its precision", at_least=1)
    num_recall: int = setting(2000, "fresh draws of p* for recall", at_least=1)
    covariance_type: str = setting("diag", "covariances of teacher and students", one_of=em.COVARIANCE_TYPES)
    max_iter: int = setting(100, "largest number of EM updates", at_least=1)
    num_starts: int = setting(1, "starts of each EM fit; the likeliest result is kept", at_least=1)
    tol: float = setting(1e-3, "change of log-likelihood per point that ends EM, nats", at_least=0)
    memory_gib: float = setting(1.0, "memory for a sweep, GiB; if it needs more, seeds run in chunks", above=0)

    sample_temperatures: tuple[float, ...] = setting(
        (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4),
        "temperatures at which every student is sampled; 1, the student itself, must be among them",
        above=0,
    )
    shares: tuple[float, ...] = setting(
        (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        "probabilities of the most selective student in the random choice between it and the plain one",
        above=0,
        below=1,
    )

    contrast_gain: float = setting(
        1.0, "gain in precision over the direct student at which the preregistered contrast is made, nats", above=0
    )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The sampling temperatures other than 1."""
        return tuple(t for t in self.sample_temperatures if t != 1)

    def check_sizes(self, num_data: int, num_distill: int, components: int) -> None:
        """ValueError for what several settings rule out together.

        Args:
            num_data: fewest draws of p* that a model is fitted to.
            num_distill: fewest draws of a teacher.
            components: most components of a model.
        """
        _check_different(self, "sample_temperatures", "shares", "gains")
        if 1.0 not in self.sample_temperatures:
            raise ValueError(f"sample_temperatures={self.sample_temperatures} must contain 1.0, the student itself")
        # Seeds are uint32 in the program, and would wrap around to the first.
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seed={self.seed} + seeds={self.seeds} must be at most 2**32")
        for name, points in (("num_data", num_data), ("num_distill", num_distill)):
            if components > points:
                raise ValueError(f"{name}={points} points are fewer than {components} components")


@spec
class VarySpec:
    """Values put into the settings of the same name, one axis at a time, and how each is run."""

    dim: tuple[int, ...] = setting((), "values of dim", at_least=2)
    num_data: tuple[int, ...] = setting((30, 1000), "values of num_data", at_least=1)
    teacher_components: tuple[int, ...] = setting((), "values of teacher_components", at_least=1)
    student_components: tuple[int, ...] = setting((), "values of student_components", at_least=1)
    num_distill: tuple[int, ...] = setting((100, 200, 400, 800, 1600), "values of num_distill", at_least=1)
    separation: tuple[float, ...] = setting((), "values of separation", above=0)
    grid: tuple[int, ...] = setting((1, 2, 4, 8), "component counts: every teacher with every student", at_least=1)
    seeds: int = setting(200, "seeds of each of these settings", at_least=1)
    num_betas: int = setting(3, "betas of each of these settings, from beta_min to beta_max", at_least=2)


@spec
class GmmSpec(SweepSpec):
    """The paper's mixture experiment, with its controls."""

    experiment: str = setting("gmm", "which experiment this is", one_of=("gmm",))
    seeds: int = setting(1000, "number of seeds, each with data and a teacher of its own", at_least=1)
    beta_min: float = setting(1.0, "smallest beta: teacher weights are raised to the power beta", above=0)
    beta_max: float = setting(100.0, "largest beta", above=0)
    num_betas: int = setting(9, "number of betas, log-spaced; from 1 to 100 an odd number includes 10", at_least=1)
    gains: tuple[float, ...] = setting(
        (0.25, 0.5, 0.75, 1.0, 1.25),
        "gains in precision at which students are compared with the cooled direct one",
        above=0,
    )
    vary: VarySpec = setting(VarySpec(), "other settings, each a sweep of its own")

    def __post_init__(self):
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min={self.beta_min} must not be above beta_max={self.beta_max}")
        if (self.num_betas == 1) != (self.beta_min == self.beta_max):
            raise ValueError(
                f"num_betas={self.num_betas} from beta_min={self.beta_min} to beta_max={self.beta_max}: "
                "one beta needs equal ends, and several need different ones"
            )
        # one axis is varied at a time, so each is checked beside the base's other settings
        vary, own = self.vary, (self.teacher_components, self.student_components)
        self.check_sizes(min((self.num_data, *vary.num_data)), min((self.num_distill, *vary.num_distill)), max(own))
        most = max((*own, *vary.teacher_components, *vary.student_components, *vary.grid))
        self.check_sizes(self.num_data, self.num_distill, most)

    @property
    def betas(self) -> np.ndarray:
        """[num_betas] log-spaced from beta_min to beta_max, both included."""
        return self._spaced(self.num_betas)

    @property
    def vary_betas(self) -> np.ndarray:
        """Fewer of them, with the same ends: the page compares the ends of all settings in one table."""
        return self._spaced(1 if self.num_betas == 1 else self.vary.num_betas)

    def _spaced(self, count: int) -> np.ndarray:
        # Log-spaced: selectivity changes with the logarithm of beta.
        return np.geomspace(self.beta_min, self.beta_max, count).astype(np.float32)


@spec
class KnobsSpec:
    """Values of each knob of selectivity, in order; an empty one is left out."""

    # of the teacher; its student is fitted by EM
    beta: tuple[float, ...] = setting(
        (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0),
        "powers of the teacher's weights",
        at_least=0,
    )
    top_k: tuple[int, ...] = setting((4, 3, 2, 1), "how many of the heaviest components are kept", at_least=1)
    top_p: tuple[float, ...] = setting((1.0, 0.8, 0.6, 0.4, 0.2), "least total weight that is kept", above=0, at_most=1)
    # of the student's loss, for the unchanged teacher
    jensen_shannon: tuple[float, ...] = setting(
        (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "0 is forward KL, 1 reverse KL", at_least=0, at_most=1
    )
    skew_forward_kl: tuple[float, ...] = setting(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7), "skew of forward KL", at_least=0, below=1
    )
    skew_reverse_kl: tuple[float, ...] = setting(
        (0.0, 0.05, 0.1, 0.2, 0.3, 0.5), "skew of reverse KL", at_least=0, below=1
    )

    def __post_init__(self):
        _check_different(self, *self.__dataclass_fields__)


@spec
class GmmFrontierSpec(SweepSpec):
    """Every knob of selectivity on one frontier."""

    experiment: str = setting("gmm_frontier", "which experiment this is", one_of=("gmm_frontier",))
    knobs: KnobsSpec = setting(KnobsSpec(), "values of the knobs of selectivity")
    gains: tuple[float, ...] = setting(
        (0.5, 1.0, 2.0, 3.0, 4.0), "gains in precision over the plain student where knobs are compared, nats", above=0
    )
    num_draws: int = setting(512, "draws of each student component in a fit by gradient", at_least=1)
    num_updates: int = setting(200, "updates of a fit by gradient", at_least=1)
    learning_rate: float = setting(0.1, "initial learning rate of a fit by gradient", above=0)

    def __post_init__(self):
        self.check_sizes(self.num_data, self.num_distill, max(self.teacher_components, self.student_components))
        if self.covariance_type != "diag":
            raise ValueError(f"covariance_type={self.covariance_type!r}: fits by gradient are diagonal")
        if max(self.knobs.top_k, default=0) > self.teacher_components:
            raise ValueError(f"knobs.top_k={self.knobs.top_k} must be at most {self.teacher_components}")
        if not self.divergences:
            raise ValueError("knobs needs at least one divergence")

    @property
    def divergences(self) -> list[Divergence]:
        """Every divergence that is asked for, once: knobs share their ends."""
        values = ((make, value) for knob, make in DIVERGENCES.items() for value in getattr(self.knobs, knob))
        return list(dict.fromkeys(make(value) for make, value in values))
