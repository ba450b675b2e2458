"""What all language-model runs share: the paper's training recipe. The files lm_*.py change what is theirs.

The chain: p* -> corpus -> teacher -> a corpus of the teacher for each tau -> students, and students on p*'s own corpus.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.experiment = "lm"
    config.seed = 0
    # A model: anything that kd_jax.lm.weights.load takes. `architecture` is a preset: of a source, it is what --dry_run
    # reckons with; without a source, random weights of that shape are p*.
    config.p_star = ConfigDict({"source": "", "architecture": ""})
    # Or data: `source` (kd_jax.lm.ingest.from_dataset) makes p*'s corpora, and the model above scores samples for
    # precision, and has the tokenizer.
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
    shape = {"preset": "", "layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}
    config.teacher, config.student = ConfigDict(shape), ConfigDict(shape)
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
