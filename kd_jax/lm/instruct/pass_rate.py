"""How often models follow instructions whose answers are checked, at several sample temperatures.

    FOLDER/NAME/instruct/SPLIT/tau-0.8/    a model's answers, a corpus
    FOLDER/p_star/instruct/...             p*'s own, for comparison

A corpus that is finished is not sampled again; rows and verdicts are computed anew from the corpora each time. The
answers of all students of one teacher and seed use the same random numbers, which makes differences between arms less
noisy. Other teachers' students use others, since errors are over teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import evaluation
from kd_jax.lm.corpus import Corpus, prompt_files
from kd_jax.lm.decode import SamplerSpec, to_corpus
from kd_jax.lm.evaluation import Entry, EvaluationSpec, LazyModel, estimates
from kd_jax.lm.instruct import checkers
from kd_jax.lm.instruct.prompts import Bytes
from kd_jax.lm.instruct.templates import WORDINGS, Instruction, instructions
from kd_jax.lm.model import Compute
from kd_jax.runs.settings import setting, spec

# The validation split chooses the temperature, the test split says how good the choice is.
SPLITS = ("validation", "test")


@spec
class InstructSpec:
    """Instructions whose answers are checked."""

    num_validation: int = setting(
        0, "instructions that choose a sample temperature; 0 leaves all of this out", at_least=0
    )
    num_test: int = setting(0, "instructions of held-out templates and nouns", at_least=0)
    samples_per_prompt: int = setting(1, "answers of a model to each instruction, for best of n", at_least=1)
    sample_temperatures: tuple[float, ...] = setting((1.0,), "of the answers", above=0)
    kinds: tuple[str, ...] = setting((), "kinds of instructions, for training too; empty for all", one_of=WORDINGS)
    arm: str = setting("", "arm of the declared contrast: its pass rate minus the control's, at equal variety")
    control: str = setting(
        "direct", "arm that it is compared with, at the best temperature at which the arm can be as varied"
    )

    def __post_init__(self):
        if bool(self.num_validation) != bool(self.num_test):
            raise ValueError(
                f"num_validation={self.num_validation} and num_test={self.num_test}: both are needed, or none"
            )
        if len(set(self.sample_temperatures)) < len(self.sample_temperatures):
            raise ValueError(f"sample_temperatures={self.sample_temperatures} has a value twice")
        for split, count in zip(SPLITS, (self.num_validation, self.num_test), strict=True):
            instructions(split, count, self.kinds)


class Answers(NamedTuple):
    """A model's answers to the instructions of a split, in their order, samples_per_prompt of each.

    Attributes:
        texts: without special tokens.
        passed: bool [instruction, sample], whether each is right.
        tokens: ids of each answer, EOS included.
        finished: bool [answer]; ended with an EOS id.
    """

    texts: list[str]
    passed: np.ndarray
    tokens: list[np.ndarray]
    finished: np.ndarray


def evaluate(
    instruct: InstructSpec, p_star: LazyModel, models: Mapping[str, Entry], settings: EvaluationSpec, folder: Path, *,
    max_length: int, mesh: Mesh | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Samples the answers of p* and of all models, and checks them.

    Args:
        p_star: its tokenizer is that of all models.
        models: by name.
        settings: seed, dtype and batch size.
        folder: of the evaluation.
        max_length: ids of an instruction and its answer.
        mesh: what models are laid out over.

    Returns: a row for each model, split and temperature (kind "instruct"), and the rows of answers.jsonl: an answer
        each, with the verdict, of the first sample of each test instruction.
    """
    tokenizer = p_star.metadata.tokenizer or Bytes()
    rows, answers = [], []
    for name, entry in {"p_star": Entry(p_star.source, "p_star"), **models}.items():
        model = p_star if name == "p_star" else LazyModel(entry.source, settings.dtype, mesh, folder)
        about = {"name": name, **{key: getattr(entry, key) for key in ("arm", "tau", "seed", "teacher")}}
        for split, tau, asked, corpus in _corpora(
            instruct, model, name, entry, settings, tokenizer, folder, max_length, mesh
        ):
            made = read(corpus, asked, tokenizer)
            at = about | {"split": split, "sample_temperature": tau}
            rows.append({"kind": "instruct", **at, **metrics(made, [one.kind for one in asked])})
            if split == "test":
                each = made.passed.shape[1]
                answers += [
                    {**at, "index": i, "prompt": one.prompt, "task": one.kind, "answer": made.texts[i * each],
                     "passed": bool(made.passed[i, 0])}
                    for i, one in enumerate(asked)
                ]  # fmt: skip
        model.remember()
        model.release()
    return rows, answers


def _corpora(
    instruct: InstructSpec, model: LazyModel, name: str, entry: Entry, settings: EvaluationSpec, tokenizer: Any,
    folder: Path, max_length: int, mesh: Mesh | None,
) -> Iterator[tuple[str, float, list[Instruction], Corpus]]:  # fmt: skip
    for number, (split, count) in enumerate(zip(SPLITS, (instruct.num_validation, instruct.num_test), strict=True)):
        asked = instructions(split, count, instruct.kinds)
        prompts = [prompt_files.encode(one.prompt, tokenizer) for one in asked]
        each = instruct.samples_per_prompt if split == "test" else 1
        seed = settings.seed + number + (entry.seed or 0) + evaluation.TEACHERS_APART * (entry.teacher or 0)
        for tau in instruct.sample_temperatures:
            sampler, label = SamplerSpec(sample_temperature=tau), f"{name}: {split} instructions at {tau:g}"
            drawn = evaluation.sampling_settings(
                model, name, [], max_length, each * count, seed, sampler, settings, prompts
            ) | prompt_files.settings(prompts, each)  # fmt: skip
            corpus = to_corpus.sample(
                model.load, folder / name / "instruct" / split / sampler.label, drawn, command=f"evaluation of {name}",
                label=label, prompts=prompts, batch_size=settings.batch_size, compute=Compute(dtype=settings.dtype),
                mesh=mesh,
            )  # fmt: skip
            yield split, tau, asked, corpus


def read(corpus: Corpus, asked: list[Instruction], tokenizer: Any) -> Answers:
    """The answers in a corpus of samples, checked."""
    rows, ends = corpus.rows(), set(corpus.manifest["settings"]["eos_ids"])
    tokens = [ids[start:] for ids, start in zip(rows.tokens, rows.prompt_length, strict=True)]
    texts = [tokenizer.decode([i for i in ids.tolist() if i not in ends]).strip() for ids in tokens]
    each = len(texts) // len(asked)
    passed = [checkers.check(asked[i // each].kind, asked[i // each].arguments, text) for i, text in enumerate(texts)]
    return Answers(texts, np.array(passed).reshape(len(asked), each), tokens, rows.finished)


def metrics(answers: Answers, kinds: list[str]) -> dict[str, Any]:
    """Numbers of a model's answers; standard errors are over instructions.

    `pass_rate` is the share of right answers, `best_of_n` the share of instructions with a right one among
    n = samples_per_prompt, and `pass_rate_KIND` that of one kind of instruction.
    """
    passed, each = answers.passed, answers.passed.shape[1]
    prompts = np.repeat(np.arange(len(passed)), each)
    rate, error = estimates.share(passed.reshape(-1), prompts)
    best, best_error = estimates.share(passed.any(axis=1))
    lengths = np.array([len(ids) for ids in answers.tokens])
    of_kind = {
        f"pass_rate_{kind}": float(passed[[one == kind for one in kinds]].mean()) for kind in dict.fromkeys(kinds)
    }
    return {
        "num_instructions": len(passed), "samples_per_prompt": each, "pass_rate": rate, "pass_rate_se": error,
        "best_of_n": best, "best_of_n_se": best_error, **of_kind,
        "distinct_2": estimates.distinct(answers.tokens, 2)[1], "repetition_4": estimates.repetition(answers.tokens),
        "finished": float(np.mean(answers.finished)), "length_mean": float(lengths.mean()),
    }  # fmt: skip
