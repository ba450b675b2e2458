"""Models for lm-evaluation-harness (`pip install lm_eval`), which has IFEval and a few hundred other tasks.

    import lm_eval
    from kd_jax.lm import weights
    from kd_jax.lm.instruct.harness import HarnessModel

    model = HarnessModel(weights.load("exported"))
    lm_eval.simple_evaluate(model, tasks=["ifeval"], apply_chat_template=True)

`kd-jax export` writes such a folder for any model of a run. Scores and greedy answers are those of the harness's own
class for transformers, for the same weights.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from kd_jax.lm import decode, score
from kd_jax.lm.decode import SamplerSpec
from kd_jax.lm.model import Model

# New tokens of an answer where a task does not say it, as in the harness.
MAX_NEW = 256
# What tasks call the most new tokens, as in the harness: of several the first counts.
_MAX_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOBS = ("top_k", "top_p", "min_p")


class HarnessModel(TemplateLM):
    """A model as the harness wants it.

    Args:
        model: with a tokenizer.
        bos: whether texts start with the BOS id; by default as the model's tokenizer does it.
        batch_size: answers that are sampled at a time.
        seed: of answers that a task wants sampled.
    Raises: ValueError for a model without a tokenizer, or without an id to start an empty context with.
    """

    def __init__(self, model: Model, *, bos: bool | None = None, batch_size: int = 64, seed: int = 0):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer, so it cannot be given the harness's texts")
        if model.bos_id is None and not model.eos_ids:
            raise ValueError("the model has neither a BOS nor an EOS id to predict a text's first token from")
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.bos = model.tokenizer.adds_bos if bos is None else bos

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_ids[0] if self.model.eos_ids else self.model.bos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.model.bos_id is None else self.model.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.bos if add_special_tokens is None else add_special_tokens and self.bos
        return self.model.tokenizer.encode(string, bos=bos)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether it is what greedy decoding gives."""
        # A context that is too long loses its start, as in the harness.
        limit = self.model.architecture.max_position_embeddings
        rows = [(context + continuation)[-limit:] for _, context, continuation in requests]
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), max(lengths, default=2)), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        (log_probs, greedy), _ = score.per_token(self.model, tokens, lengths, _log_prob_and_greedy)
        results = []
        for i, (_, _, continuation) in enumerate(requests):
            # entry j is of token j + 1
            part = slice(lengths[i] - 1 - len(continuation), lengths[i] - 1)
            results.append((float(log_probs[i, part].sum(dtype=np.float64)), bool(greedy[i, part].all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each in as few windows as hold it."""
        windows, text = [], []
        for i, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.model.architecture.max_position_embeddings - 1, context_len=1,
            ):  # fmt: skip
                windows.append((None, *utils.make_disjoint_window(window)))
                text.append(i)
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(text, values, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each prompt, up to the first of its stop strings; greedy unless the task asks for sampling."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_generation(request.args[1])].append(i)
        texts = [""] * len(requests)
        for (new, sampler), members in groups.items():
            answers = self._answers([requests[i].args[0] for i in members], new, sampler)
            for i, text in zip(members, answers, strict=True):
                until = requests[i].args[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts[i] = text
        return texts

    def _answers(self, prompts: list[str], new: int, sampler: SamplerSpec) -> list[str]:
        limit = self.model.architecture.max_position_embeddings
        if new >= limit:
            raise ValueError(f"an answer of {new} tokens leaves no room for a prompt: the model has {limit} positions")
        ids = [self.tok_encode(prompt)[new - limit :] or [self.prefix_token_id] for prompt in prompts]
        longest = max(len(prompt) for prompt in ids) + new
        tokens, lengths, _ = decode.generate(
            self.model, ids, len(ids), max_length=longest, seed=self.seed, batch_size=self.batch_size, sampler=sampler
        )
        answers = []
        for prompt, row, length in zip(ids, tokens, lengths, strict=True):
            answer = row[len(prompt) : min(length, len(prompt) + new)]
            answers.append(self.model.tokenizer.decode(answer.tolist(), skip_special=True))
        return answers


def _generation(settings: dict[str, Any]) -> tuple[int, SamplerSpec]:
    """The most new tokens, and how they are drawn, of a task's generation settings.

    Raises: ValueError for a setting that would change the answers and that is not known here.
    """
    known = {"until", "do_sample", "temperature", *_KNOBS, *_MAX_NEW_NAMES}
    for name, value in settings.items():
        # numbers of 0 and 1 and booleans leave the others off: num_beams, repetition_penalty, use_cache
        if name not in known and value not in (None, 0, 1):
            raise ValueError(f"generation setting {name}={value!r} is not one of {', '.join(sorted(known))}")
    new = next((settings[name] for name in _MAX_NEW_NAMES if settings.get(name) is not None), MAX_NEW)
    temperature, sampled = settings.get("temperature"), settings.get("do_sample")
    if not ((temperature or 0) > 0 if sampled is None else sampled):
        return int(new), SamplerSpec(top_k=1)  # the most probable token alone
    knobs = {"sample_temperature": temperature, **{name: settings.get(name) for name in _KNOBS}}
    return int(new), SamplerSpec.of(knobs)


def _log_prob_and_greedy(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]
    return chosen, (logits.argmax(-1) == ids).astype(jnp.int32)
