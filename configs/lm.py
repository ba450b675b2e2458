"""What all language-model runs share: the paper's training recipe. The files lm_*.py change what is theirs.

The chain: p* -> corpus -> teacher -> a corpus of the teacher for each tau -> students, and students on p*'s own corpus.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "lm"
    config.seed = 0
    # A model: anything that kd_jax.lm.weights.load takes. `architecture` is a preset: of a source, it is what --dry_run
    # reckons with; without a source, random weights of that shape are p*.
    config.p_star = ConfigDict({"source": "", "architecture": ""})
    # Or data: `source` (kd_jax.lm.corpus.ingest.from_dataset) makes p*'s corpora, and the model above scores samples
    # for precision, and has the tokenizer.
    config.data = ConfigDict({"source": "", "split": "train", "text_column": "", "ids_column": ""})
    config.num_train = 1024  # sequences that a model is trained on
    config.num_validation = 128  # further ones, by which its checkpoint is chosen
    config.num_recall = 512  # of p*, on which recall is measured
    config.num_samples = 512  # of each model, on which precision is measured
    config.taus = (0.8, 0.875, 0.95, 1.0)
    config.seeds = 3  # students of each arm
    config.sampling = ConfigDict(
        {"prompt": "The", "prompt_ids": (), "max_length": 48, "batch_size": 64, "shard_size": 1024, "dtype": "float32"}
    )
    # How students learn from a teacher. "sequence": its text, at each of `taus`. "online": its distribution at each
    # position of a text. "on_policy": that, on text that the student itself samples, for a share of the updates.
    # "offline": its likeliest tokens, recorded with the text. `arms` are named students beside those of `taus`: each
    # says what differs from `distill`. With no arms, a policy that is not "sequence" makes one of its own name.
    config.distill = ConfigDict(
        {
            "policy": "sequence",
            # one of kd_jax.losses.DIVERGENCES, its beta or alpha if it has one, and the cross-entropy's share
            "divergence": "forward_kl", "parameter": config_dict.placeholder(float), "hard_weight": 0.0,
            "loss_temperature": 1.0, "teacher_temperature": config_dict.placeholder(float),  # none: as the student's
            # the text: "p_star", "samples" of the teacher, or a "mix" with this share of samples
            "data": "p_star", "mix": 0.5,
            "sample_temperature": 1.0, "top_k": 0, "top_p": 1.0,  # of the samples; 0 and 1 for all ids
            # the student's own: the share of updates (lambda), ids of p*'s rows to begin with (0: the prompt), at a
            # time (0: all of an update)
            "on_policy_fraction": 0.5, "prompt_length": 0, "student_sample_temperature": 1.0, "rollout_batch_size": 0,
            "record_top_k": 64, "log_prob_format": "uint16", "tail": "bucket",  # or "float32"; or "renormalise"
            # how the teacher is run, and laid out over the devices
            "teacher_dtype": "float32", "teacher_mesh": ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}),
        }
    )  # fmt: skip
    config.arms = ConfigDict()
    # Knobs of selectivity to compare, ((name, ((value, arm), ...)), ...): see kd_jax.lm.experiment.knobs.
    config.frontier = ConfigDict({"knobs": (), "references": ("tau-1",), "gains": (0.5, 1.0, 2.0)})
    shape = {"preset": "", "layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}
    config.teacher, config.student = ConfigDict(shape), ConfigDict(shape)
    config.teacher.source = ""  # a model that is there already, in place of one trained on p*'s corpus
    config.train = ConfigDict(
        {
            "epochs": 5, "batch_size": 256, "row_length": 0, "parts": 1, "learning_rate": 5e-4, "warmup": 0.01,
            "decay": 0.2, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0, "validations": 10,
            "save_every": 0, "log_every": 10, "keep": 1, "keep_checkpoints": False, "trackers": (),
            "together": 1,  # students of an arm trained in one program: quicker on a GPU that one does not fill
        }
    )  # fmt: skip
    config.compute = ConfigDict({"dtype": "float32", "attention": "auto", "query_block": 128, "remat": False})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config
