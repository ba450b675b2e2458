"""How much of the teacher's text, and which of it: is distillation's gain one of amount, of entropy, or of likely text?

    python -m kd_jax.train --config configs/lm_text.py --workdir runs/text
    python -m kd_jax.train --config configs/lm_text.py:smoke --workdir runs/text_smoke    (tiny random p*, minutes)

Students learn the teacher's text at tau = 0.8, in 1, 2, 4, 8 and 16 times as many rows as p*'s corpus has, for the same
number of epochs: a teacher can write without end. Three controls change the entropy of the teacher's own text (tau =
1): the likeliest tenth of its samples, the least likely tenth, and a tenth of the rows over and over. If likely text is
what raises precision, the last two do not raise it; if low entropy alone does, repetition raises it, too. Compare the
three by their measured entropy, not by name: in nats a token it is 6.73 for all samples, 5.64 for the likeliest tenth,
7.60 for the least likely, and 0.09 for the repeated one.

The comparison named before the run: 16 times the text against the direct student cooled to equal precision.
Cost: 102 minutes on two AVX-512 cores shared with other work. Result: with 16 times the text there is no clear
difference from the cooled direct student (0.073 +- 0.095 nats of recall; once the text: 0.240 +- 0.058 less). Likely
text raises precision, unlikely text and repetition lower it (docs/language_models.md).
"""

from ml_collections import ConfigDict

from configs import lm_laptop

AMOUNTS = (2, 4, 8, 16)


def get_config(arg: str = "") -> ConfigDict:
    config = lm_laptop.get_config(arg)
    config.arms = ConfigDict()
    config.taus = (0.8, 1.0)
    if not arg:
        config.num_train, config.cooled_arms = 672, ("direct",)
    rows = config.get_ref("num_train")  # so that another num_train changes the amounts with it
    for amount in AMOUNTS:
        config.arms[f"x{amount}"] = ConfigDict(
            {"policy": "sequence", "text_rows": rows * amount, "sampler": {"sample_temperature": 0.8}}
        )
    for choice in ("likeliest", "least_likely", "repeated"):
        config.arms[choice] = ConfigDict({"policy": "sequence", "text_choice": choice, "text_share": 0.1})
    config.contrast.arm = f"x{AMOUNTS[-1]}"
    return config
