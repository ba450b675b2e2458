"""Where does the trade begin and end? One cell of a grid: a teacher of one size, students of another.

    python -m benchmarks.lm_capacity --workdir runs/capacity                                     (all nine cells)
    python -m kd_jax.train --config configs/lm_capacity.py:large-small --workdir runs/large-small    (one of them)

p* is the real SmolLM2-135M-Instruct, as in lm_laptop.py; students learn its text, or the teacher's text at tau = 0.8,
and the direct students are also sampled at lower temperatures. A cell's comparison, named before the run, is of the two
at equal precision. The benchmark runs all cells in one folder, so they share p*'s corpora. Cost: about 140 minutes on
two AVX2 cores. Result: no cell has a clear gain in recall at equal precision; the loss is larger, the larger the
student and the smaller the teacher (docs/language_models.md).
"""

from ml_collections import ConfigDict

from configs import lm_laptop

SIZES = {
    "small": {"layers": 1, "width": 64, "heads": 2, "kv_heads": 1, "mlp": 192},
    "medium": {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384},
    "large": {"layers": 4, "width": 256, "heads": 8, "kv_heads": 4, "mlp": 768},
}


def get_config(arg: str = "large-medium") -> ConfigDict:
    cell, _, smoke = arg.partition(",")
    teacher, _, student = cell.partition("-")
    if teacher not in SIZES or student not in SIZES or smoke not in ("", "smoke"):
        raise ValueError(f"configs/lm_capacity.py:{arg} is not TEACHER-STUDENT or TEACHER-STUDENT,smoke; sizes are "
                         f"{', '.join(SIZES)}")  # fmt: skip
    config = lm_laptop.get_config(smoke)
    config.arms = ConfigDict()
    config.taus, config.cooled_arms = (0.8,), ("direct",)
    config.teacher.update(SIZES[teacher])
    config.student.update(SIZES[student])
    config.contrast.arm = "tau-0.8"
    if not smoke:
        config.num_train, config.num_samples = 672, 128
    return config
