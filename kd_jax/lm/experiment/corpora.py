"""The stages that make corpora: p*'s, the teacher's samples, text chosen among these, and recorded teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import evaluation, weights
from kd_jax.lm.corpus import Corpus, conversations, documents, ingest
from kd_jax.lm.decode import chosen_text, to_corpus
from kd_jax.lm.distill import alignment, recorded_top_k, reencoded
from kd_jax.lm.evaluation import Entry, estimates
from kd_jax.lm.experiment import arms as arms_lib
from kd_jax.lm.experiment import cost, roles
from kd_jax.lm.experiment.arms import TRAIN, Arm, Recording, of_teacher
from kd_jax.lm.experiment.specs import LmSpec, described, make_mesh, planned_shape
from kd_jax.lm.instruct import prompts
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.parallel import distributed
from kd_jax.runs import packages
from kd_jax.runs.settings import to_dict
from kd_jax.runs.stages import Stage

# What a random number is for: seeds of corpora and models are config.seed plus one of these, far apart. 6 million
# belongs to the evaluation (results.py).
TRAIN_SEED, VALIDATION_SEED, TEACHER_SEED, SAMPLES_SEED, STUDENT_SEED = (1_000_000 * i for i in range(1, 6))
# In the folder of a stage: the corpus as the teacher drew it, where the students' vocabulary is another one.
TEACHERS_IDS = "teachers_ids"
# Between the seeds of one teacher and those of the next.
APART = evaluation.TEACHERS_APART


def p_star(spec: LmSpec, identity: str, teacher: int) -> Stage:
    """The corpus of p* that a teacher and its students learn from.

    Args:
        identity: the fingerprint of p*'s weights.
        teacher: which of the run's teachers.
    """
    size, first = spec.num_train + spec.num_validation, spec.first_row(teacher)
    # of data, no two corpora share a document: each begins where the one before ends
    return _p_star(spec, identity, of_teacher(TRAIN, teacher), size, TRAIN_SEED + APART * teacher, first)


def validation(spec: LmSpec, identity: str) -> Stage:
    """The corpus of p* that recall is measured on."""
    after = spec.num_train + spec.num_validation
    return _p_star(spec, identity, "p_star/validation", spec.num_recall, VALIDATION_SEED, after)


def _p_star(spec: LmSpec, identity: str, name: str, num_samples: int, purpose: int, first: int) -> Stage:
    """A corpus of p*'s samples, or of data from the document `first` on."""
    settings = _sampling(spec, num_samples, SamplerSpec(), purpose, first) | {
        "p_star": to_dict(spec.p_star), "identity": identity,
    }  # fmt: skip
    if spec.data.source:
        settings |= {"data": to_dict(spec.data), "data_identity": documents.identity(spec.data.source), "first": first}
    if spec.data.conversations:
        settings["conversations"] = conversations.VERSION

    def work(folder: Path, _: dict[str, Path]) -> dict[str, Any]:
        model = roles.p_star(spec)
        # Later stages read p*'s ids, tokenizer and shape here, without loading its weights.
        weights.save_description(model, folder)
        if spec.data.source:
            return _ingest(spec, folder, first, num_samples, for_recall=purpose == VALIDATION_SEED)
        return _sample(spec, model, folder, settings, name, first)

    price = cost.copying if spec.data.source else cost.sampling
    return Stage(name, settings, (), work, price(spec, planned_shape(spec, "p_star"), num_samples))


def samples(spec: LmSpec, arm: Arm, teacher: int, vocabulary: str | None = None) -> Stage:
    """The samples of a teacher that an arm's text is made of.

    Args:
        arm: whose text it is.
        teacher: which of the run's teachers.
        vocabulary: of p*, the fingerprint of its weights, where the teacher has another one; else None.
    """
    # Every sampler gets the same random numbers: differences between them are less noisy. And row i is the same
    # whatever the number of rows: more text begins with less.
    count, first = arm.text.num_samples(spec.num_train, spec.num_validation), spec.first_row(teacher)
    settings = _sampling(spec, count, arm.sampler, SAMPLES_SEED + APART * teacher, first)
    name = of_teacher(arms_lib.samples_of(spec, arm), teacher)
    if vocabulary is not None:
        settings["vocabulary"] = vocabulary

    if spec.own_prompts and arm.text.rows:
        settings["num_train"] = spec.num_train  # where the validation rows' prompts begin
    # a teacher that has learnt answers to requests is asked the same ones
    asked = (of_teacher(TRAIN, teacher),) if spec.data.conversations else ()

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        model = roles.teacher(spec, inputs, spec.sampling.dtype, make_mesh(spec.mesh), teacher)
        if vocabulary is None:
            requests = corpus_lib.open(inputs[asked[0]] / "corpus") if asked else None
            rows = arm.text.rows or spec.num_train
            return _sample(spec, model, folder, settings, name, first, text_rows=rows, asked=requests)
        # The text of the student's prompt, whatever its ids are: both models' sequences are of the same texts.
        prompt = alignment.prompt(*_student_prompt(spec), model.tokenizer, model.eos_ids)
        _sample(spec, model, folder / TEACHERS_IDS, settings, name, first, prompt)
        return _in_students_ids(spec, folder, name)

    price = cost.sampling(spec, planned_shape(spec, "teacher"), settings["num_samples"])
    inputs = (*asked, *roles.teacher_inputs(spec, teacher))
    return Stage(name, settings | roles.teacher_identity(spec), inputs, work, price)


def chosen(spec: LmSpec, arm: Arm, teacher: int, vocabulary: str | None = None) -> Stage:
    """The text of an arm that learns a part of a teacher's samples; the arguments are those of `samples`."""
    source, name = of_teacher(arms_lib.samples_of(spec, arm), teacher), of_teacher(arm.texts[-1], teacher)
    rows = arm.text.rows or spec.num_train
    settings = {**arm.text._asdict(), "rows": rows, "num_validation": spec.num_validation}

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        # By the teacher's probabilities, so before a change of ids.
        part = TEACHERS_IDS if vocabulary else ""
        corpus, surprise, tokens = chosen_text.write(
            corpus_lib.open(inputs[source] / part / "corpus"), folder / part / "corpus", arm.text, num_train=rows,
            num_validation=spec.num_validation, command=f"stage {name}", label=name,
        )  # fmt: skip
        if vocabulary:
            return _in_students_ids(spec, folder, name)
        entropy, entropy_se = estimates.per_token(surprise, tokens)
        return {**corpus.manifest["counts"], "entropy": entropy, "entropy_se": entropy_se}

    price = cost.copying(spec, planned_shape(spec, "teacher"), rows + spec.num_validation)
    return Stage(name, settings, (source,), work, price)


def recorded(spec: LmSpec, recording: Recording, text: str, teacher: int) -> Stage:
    """A corpus once more, with the teacher's most probable tokens at each position."""
    settings = recording._asdict() | roles.teacher_identity(spec)
    name, dtype = of_teacher(recording.name(text), teacher), recording.teacher_dtype
    text = of_teacher(text, teacher)

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        # The mesh that the teacher would have in online distillation, too.
        mesh = make_mesh(spec.teacher_mesh)
        model, source = roles.teacher(spec, inputs, dtype, mesh, teacher), corpus_lib.open(inputs[text] / "corpus")
        teacher_settings = recorded_top_k.settings(
            model, spec.teacher.source or "teacher", recording.top_k, recording.log_prob_format, dtype,
            corpus_lib.fingerprint(source),
        )  # fmt: skip
        corpus = recorded_top_k.score_corpus(
            source, folder / "corpus", model, teacher_settings, command=f"stage {name}", label=name,
            compute=Compute(dtype=dtype), mesh=mesh,
        )  # fmt: skip
        return {**corpus.manifest["counts"], "entropy": None, "entropy_se": None}

    price = cost.scoring(spec, planned_shape(spec, "teacher"), recording.top_k)
    return Stage(name, settings, (text, *roles.teacher_inputs(spec, teacher)), work, price)


def reencoded_texts(spec: LmSpec, folders: dict[str, Path]) -> list[tuple[str, Entry, Corpus]]:
    """The samples of a teacher with another vocabulary in the students' ids: (stage, what it is of, corpus) each.

    Args:
        folders: of the stages, by name.
    """
    if roles.other_vocabulary(spec) is None:
        return []
    taus = {arms_lib.samples_of(spec, arm): arm.tau for arm in arms_lib.arms(spec) if arm.sampler is not None}
    return [
        (stage, Entry(spec.teacher.source, "teacher", tau, None, teacher=0), corpus_lib.open(folders[stage] / "corpus"))
        for stage, tau in taus.items()
    ]


def _student_prompt(spec: LmSpec) -> tuple[Tokenizer, list[int]]:
    """p*'s tokenizer, which is the students', and the prompt of all samples in its ids."""
    tokenizer = described(spec.p_star.source).tokenizer
    return tokenizer, prompts.of_corpus(spec, tokenizer, 0, 0)[0]["prompt_ids"]


def _in_students_ids(spec: LmSpec, folder: Path, label: str) -> dict[str, Any]:
    """Writes the corpus of a stage from that in the teacher's ids; returns its counts, and what got lost on the way."""
    drawn, p_star = corpus_lib.open(folder / TEACHERS_IDS / "corpus"), described(spec.p_star.source)
    corpus = reencoded.write(
        drawn, described(spec.teacher.source).tokenizer, p_star, folder / "corpus",
        student_source=spec.p_star.source, prompt_ids=_student_prompt(spec)[1], max_length=spec.sampling.max_length,
        command=f"stage {label}",
    )  # fmt: skip
    # Nats per token of the teacher's would be compared with nats per token of other models'.
    entropy = {"entropy": None, "entropy_se": None}
    return {**corpus.manifest["counts"], **entropy, "reencoded": corpus.manifest["reencoded"]}


def _sampling(spec: LmSpec, num_samples: int, sampler: SamplerSpec, purpose: int, first: int) -> dict[str, Any]:
    """The settings of a corpus of samples; settings of the sampler that are off are left out."""
    s = spec.sampling
    return prompts.settings(s, first, spec.instruct.kinds) | {
        "prompt": s.prompt, "prompt_ids": list(s.prompt_ids), "max_length": s.max_length, "shard_size": s.shard_size,
        "num_samples": num_samples, "seed": spec.seed + purpose, "dtype": s.dtype,
        **{name: value for name, value in sampler.knobs().items() if value is not None},
    }  # fmt: skip


def _sample(
    spec: LmSpec, model: Model, folder: Path, settings: dict[str, Any], label: str, first: int,
    prompt_ids: list[int] | None = None, text_rows: int = 0, asked: Corpus | None = None,
) -> dict:  # fmt: skip
    """Samples the corpus of a stage; returns its counts and its entropy in nats per token.

    Args:
        first, text_rows, asked: which prompts, see prompts.of_corpus.
        prompt_ids: of all samples, in place of config.sampling's.
    """
    tokenizer = model.tokenizer
    if prompt_ids is None:
        prompt, chosen_prompts = prompts.of_corpus(spec, tokenizer, first, settings["num_samples"], text_rows, asked)
    else:
        prompt, chosen_prompts = {"prompt": None, "prompt_ids": prompt_ids}, None
    names = ("max_length", "shard_size", "num_samples", "seed", "dtype")
    corpus_settings = {name: settings[name] for name in names} | SamplerSpec.of(settings).knobs()
    corpus_settings |= {
        "source": label, "model_fingerprint": weights.fingerprint(model.params),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "eos_ids": sorted(model.eos_ids), **prompt,
    }  # fmt: skip
    corpus = to_corpus.sample(
        model, folder / "corpus", corpus_settings, command=f"stage {label}", label=label,
        prompts=chosen_prompts, batch_size=spec.sampling.batch_size, compute=Compute(dtype=settings["dtype"]),
        mesh=make_mesh(spec.mesh),
    )  # fmt: skip
    # From the log-probabilities that sampling has kept: nothing is scored again.
    entropy, entropy_se = estimates.corpus_entropy(corpus)
    return {**corpus.manifest["counts"], "entropy": entropy, "entropy_se": entropy_se}


def _ingest(spec: LmSpec, folder: Path, first: int, num_samples: int, for_recall: bool) -> dict[str, Any]:
    """Rows of the data set as the corpus of a stage; their entropy is unknown.

    Raises: ValueError, in the first such stage, where the data have too few documents for all of the run's corpora; and
        where the rows for recall have too few different requests for the samples of the evaluation.
    """
    data = spec.data
    count = spec.num_recall + spec.teachers * (spec.num_train + spec.num_validation)
    needed = count, "num_recall + teachers x (num_train + num_validation)"
    eos = True if data.eos_id is None else data.eos_id
    if data.conversations:
        # a chat template may close a turn with another EOS of the model than the tokenizer's
        p_star = described(spec.p_star.source)
        eos = list(dict.fromkeys([p_star.tokenizer.eos_id if eos is True else eos, *p_star.eos_ids]))

    def read() -> dict[str, Any]:
        # One process reads and tokenises for all.
        corpus = ingest.from_dataset(
            packages.locate(data.source), folder / "corpus", spec.p_star.source, **data.reading, first=first,
            num_samples=num_samples, special_tokens=data.special_tokens, eos=eos, seed=spec.seed,
            max_length=spec.sampling.max_length, prompt_ids=spec.sampling.prompt_ids,
            shard_size=spec.sampling.shard_size, needed=needed,
        )  # fmt: skip
        if corpus.manifest.get("skipped"):
            print(f"left out of {data.source}: {ingest.left_out(corpus.manifest['skipped'])}", flush=True)
        if for_recall and data.conversations:
            # before any training: the evaluation would refuse them after all of it
            label, each = f"config.data.source={data.source}: recall's part", spec.evaluation.samples_per_prompt
            evaluation.different_prompts(label, corpus.rows(), spec.num_samples, each)
        return corpus.manifest["counts"]

    return {**distributed.once(read, f"reading {data.source}"), "entropy": None, "entropy_se": None}
