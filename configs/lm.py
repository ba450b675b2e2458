"""The defaults of all language-model runs, with the paper's training recipe. Files lm_*.py set what differs.

The chain: p* -> corpus -> teacher -> a corpus of the teacher for each tau -> students, and students on p*'s own corpus.
Each setting is declared once, with its meaning, in a spec; LmSpec in kd_jax/lm/experiment/specs.py has them all.
"""

from ml_collections import ConfigDict

from kd_jax.lm.experiment.specs import LmSpec
from kd_jax.runs.settings import defaults


def get_config() -> ConfigDict:
    return defaults(LmSpec)
