"""The instruction experiment at the paper's size: SmolLM2-1.7B-Instruct -> 360M -> 135M, prompts from the hub.

    python -m kd_jax.train --config configs/lm_instruct_paper.py --workdir runs/instruct --dry_run
    python -m kd_jax.train --config configs/lm_instruct_paper.py --workdir runs/instruct

Prompts are those of smol-smoltalk (Apache 2.0), which small SmolLM2-Instruct models were tuned on. Teacher and students
are trained from scratch, as in the paper. Arms, the declared contrast, and what would confirm or refute it are those of
configs/lm_instruct_laptop.py; instructions are of all kinds, and one more arm learns four times as much of the
teacher's text (four answers to each prompt). For accelerators: --dry_run says what each stage costs. Not run yet.
"""

from ml_collections import ConfigDict

from configs import lm_instruct_laptop


def get_config() -> ConfigDict:
    config = lm_instruct_laptop.get_config()
    config.p_star.update(source="HuggingFaceTB/SmolLM2-1.7B-Instruct", architecture="smollm2-1.7b")
    config.teacher.update(source="", preset="smollm2-360m")
    config.student.update(source="", layers_kept="", preset="smollm2-135m")
    config.sampling.update(
        prompts=("HuggingFaceTB/smol-smoltalk", "templates"), max_length=1024, batch_size=256, dtype="bfloat16"
    )
    config.num_train, config.num_validation, config.num_recall, config.num_samples = 400_000, 4000, 4000, 4000
    config.seeds = 5
    config.arms["x4"] = ConfigDict(
        {"policy": "sequence", "text_rows": config.get_ref("num_train") * 4, "sampler": {"sample_temperature": 0.8}}
    )
    config.instruct.update(kinds=(), num_validation=48, num_test=256, sample_temperatures=(1.0, 0.8, 0.6))
    config.train.update(epochs=2, updates=0, batch_size=128, learning_rate=3e-4, row_length=2048, validations=10)
    config.compute.dtype = "bfloat16"
    return config
