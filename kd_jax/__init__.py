"""Knowledge distillation of generative models, in JAX: losses, metrics, and experiments with error bars.

    kd_jax.losses        divergences between teacher and student, and distillation_loss
    kd_jax.fused         the same from hidden states, without logits in memory
    kd_jax.metrics       Mean, precision and recall by nearest neighbours, MAUVE
    kd_jax.gmm           Gaussian mixtures: densities, EM, the mixture experiment
    kd_jax.lm            language models: weights, sampling, scoring, distillation, the experiment

Commands: `kd-jax train | sweep | compare | report | sample | corpus | teacher | evaluate | export`, or
`python -m kd_jax.train` and so on; each has --help.
Nothing is imported before it is used.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["fused", "gmm", "lm", "losses", "metrics"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'kd_jax' has no attribute {name!r}")
    return importlib.import_module(f"kd_jax.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
