"""Drawing a token from logits. Pure functions; all arithmetic is float32.

A new way to draw is added in two places: a field of SamplerSpec (kd_jax.lm.sampler_spec), and an argument of the same
name in `cut` here. Command lines, corpus manifests, the device program, scoring and pages take the fields as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.parallel import mesh as mesh_lib

# Ids of a block in `draw`: 49152 ids are 384 blocks of 128, so both cumulative sums of a draw are short.
_BLOCK = 128
# Truncation first looks at this many of the likeliest ids: they nearly always decide, and a full search is slow.
_CANDIDATES = 256


class Draw(NamedTuple):
    """Tokens and their log-probabilities, each [...].

    Attributes:
        token: int32 ids.
        log_prob: under the model itself (temperature 1, no truncation), float32 nats.
        sample_log_prob: under the distribution drawn from, after temperature and truncation; 0 for the greedy choice.
    """

    token: jax.Array
    log_prob: jax.Array
    sample_log_prob: jax.Array


def sample(
    uniforms: jax.Array, logits: jax.Array, sample_temperature: jax.Array, *, mesh: Mesh | None = None,
    **truncation: jax.Array | None,
) -> Draw:  # fmt: skip
    """Draws a token for each row of logits; see `temper`, `cut` and `draw`.

    All values are traced, so that others do not compile again; a truncation that is None is left out.

    Args:
        uniforms: float32 [..., 2], in [0, 1).
        logits: [..., vocab].
        sample_temperature: a scalar or [...]; 0 takes the likeliest id.
        mesh: where rows [row, vocab] are split over devices, and the vocabulary where tensor splits the head.
        truncation: of `cut`.
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(jnp.asarray(sample_temperature, jnp.float32), logits.shape[:-1])
    greedy = temperature == 0
    # Shifted before exp: nothing overflows, and the likeliest id's term is 1, so the sum is never 0.
    below = logits - logits.max(axis=-1, keepdims=True)
    tempered = cut(temper(logits, temperature), **truncation, mesh=mesh)
    # among equals the greedy choice is the lowest id, which is what a uniform of 0 picks
    token, log_total = draw(jnp.where(greedy[..., None], 0, uniforms), tempered)
    drawn = jnp.take_along_axis(below, token[..., None], axis=-1)[..., 0]
    log_prob = drawn - jnp.log(jnp.exp(below).sum(axis=-1))
    # `log_total` sums over the kept ids alone: this log-probability is normalised after the truncation.
    return Draw(token, log_prob, jnp.where(greedy, 0, drawn / _divisor(temperature) - log_total))


def log_prob(
    logits: jax.Array, ids: jax.Array, sample_temperature: jax.Array, **truncation: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """How likely ids are under the distribution that `sample` draws from, and how likely its likeliest id is.

    Args:
        logits: [..., vocab].
        ids: int [...].
        sample_temperature: a scalar; at 0 the likeliest id has all of the probability.
        truncation: of `cut`.
    Returns: log-probabilities of the ids, -inf for one that is never drawn, and of the likeliest id, float32 [...].
    """
    # Not the shifted logits: at temperature 1 these are the logits themselves, and rounded as the model's own scores.
    scaled = logits.astype(jnp.float32) / _divisor(jnp.asarray(sample_temperature, jnp.float32))
    if any(value is not None for value in truncation.values()):
        kept = cut(temper(logits, sample_temperature), **truncation) > -jnp.inf
        scaled = jnp.where(kept, scaled, -jnp.inf)

    def greedy(scaled):  # the first of the likeliest ids is drawn, and no other one ever is
        first = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == first, scaled, -jnp.inf)

    # a branch: other temperatures need no argmax
    scaled = jax.lax.cond(jnp.asarray(sample_temperature) == 0, greedy, lambda scaled: scaled, scaled)
    total = jax.nn.logsumexp(scaled, axis=-1)
    return jnp.take_along_axis(scaled, ids[..., None], axis=-1)[..., 0] - total, scaled.max(axis=-1) - total


def cut(
    tempered: jax.Array, *, top_k: jax.Array | None = None, top_p: jax.Array | None = None,
    min_p: jax.Array | None = None, mesh: Mesh | None = None,
) -> jax.Array:  # fmt: skip
    """-inf for the ids that truncation leaves out: by top-k, then top-p, then min-p; see SamplerSpec.

    Args:
        tempered: logits [..., vocab], the largest 0 (see `temper`).
        top_k, top_p, min_p: scalars; None for off, and then no part of the program.
        mesh: see `sample`.
    """
    if top_k is not None or top_p is not None:
        vocab = tempered.shape[-1]
        tempered = truncate(tempered, vocab if top_k is None else top_k, 1.0 if top_p is None else top_p, mesh)
    if min_p is not None:
        # the likeliest id is never left out before, so its logit is still 0
        tempered = jnp.where(jnp.exp(tempered) >= min_p, tempered, -jnp.inf)
    return tempered


def temper(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """float32 logits / temperature, shifted so that the largest is 0; at temperature 0 all others underflow in exp.

    Args:
        logits: [..., vocab].
        temperature: a scalar or [...].
    """
    logits = logits.astype(jnp.float32)
    below = logits - logits.max(axis=-1, keepdims=True)
    return below / _divisor(jnp.asarray(temperature, jnp.float32))[..., None]


def _divisor(temperature: jax.Array) -> jax.Array:
    # Divided by 1e-30, any difference of float32 logits of a usual size underflows in exp.
    return jnp.where(temperature > 0, temperature, 1e-30)


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """-inf for the ids that top-k and then top-p leave out. Ids are ordered by logit and, among equals, by id.

    Args:
        logits: [..., vocab], the largest 0 (see `temper`).
        top_k: how many are kept, at least 1; vocab or more keeps all.
        top_p: the fewest ids are kept whose probability after top-k reaches this, the one that crosses it included;
            above 0, and 1 keeps all.
        mesh: see `sample`.
    """
    vocab = logits.shape[-1]
    top_k, top_p = jnp.asarray(top_k, jnp.float32), jnp.asarray(top_p, jnp.float32)
    values, _ = mesh_lib.top_k(logits, min(_CANDIDATES, vocab), ("batch", "vocab"), mesh)
    ranks = jnp.arange(values.shape[-1])
    mass = jnp.cumsum(jnp.where(ranks < top_k, jnp.exp(values), 0), axis=-1)
    # Top-p is a share of what top-k leaves. Beyond the candidates the sum is over all ids, which is right only where
    # top-k keeps all of them; `decided` below sends the other cases to the search.
    total = jnp.where(top_k > values.shape[-1], jnp.exp(logits).sum(axis=-1), mass[..., -1])
    by_mass = jnp.where(top_p < 1, (mass < (top_p * total)[..., None]).sum(axis=-1) + 1, vocab)
    # Ids whose logit is -inf (those beyond the tokenizer's vocabulary) are not kept, however large top_k is.
    possible = jnp.where(values[..., -1] > -jnp.inf, vocab, (values > -jnp.inf).sum(axis=-1))
    kept = jnp.minimum(jnp.minimum(by_mass, top_k), possible)
    last = jnp.minimum(kept - 1, values.shape[-1] - 1).astype(jnp.int32)[..., None]
    # A threshold on the logits, since it needs no scatter of ids. Equal logits at the edge make it keep too many.
    leading = (logits >= jnp.take_along_axis(values, last, axis=-1)) & (logits > -jnp.inf)
    # Where the candidates do not decide, or equal logits lie on both sides of the edge, the vocabulary is searched.
    decided = ((leading.sum(axis=-1) == kept) & (kept <= values.shape[-1])).all()
    decided = decided & ((top_k <= values.shape[-1]) | (top_k >= vocab))
    everything = (top_k >= vocab) & (top_p >= 1)
    leading, decided = leading | everything, decided | everything
    # One branch for the whole batch: a `cond` for each row would become a select, and the search would always run.
    mask = jax.lax.cond(decided, lambda: leading, lambda: _search(logits, top_k, top_p))
    return jnp.where(mask, logits, -jnp.inf)


def draw(uniforms: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws by inverting the cumulative distribution in two levels: first a block of 128 ids, then an id in it.

    This needs two uniforms a row, where Gumbel noise needs one variate for each id of the vocabulary. Two levels also
    reach ids in tails below the resolution of one float32 uniform, 2**-23.

    Args:
        uniforms: [..., 2], in [0, 1); 0 picks the first id that has any weight.
        logits: [..., vocab], the largest 0; -inf is never drawn.
    Returns: int32 ids [...], and the logarithm of the sum of exp(logits) [...].
    """
    pad = -logits.shape[-1] % _BLOCK
    if pad:
        logits = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, pad)], constant_values=-jnp.inf)
    blocks = logits.reshape(*logits.shape[:-1], -1, _BLOCK)
    weights = jnp.exp(blocks).sum(axis=-1)
    block = _pick(uniforms[..., 0], weights)
    # Only the chosen block is read again; a cumulative sum over all ids would write the whole vocabulary.
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    token = block * _BLOCK + _pick(uniforms[..., 1], jnp.exp(inside))
    return token.astype(jnp.int32), jnp.log(weights.sum(axis=-1))


def _pick(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """The first index at which the cumulative weight exceeds `uniform` times the total; never one of weight 0."""
    total = jnp.cumsum(weights, axis=-1)
    # By rounding, the cumulative sum may step over the threshold at an id of weight 0; such an id is passed over.
    passed = (total > (uniform * total[..., -1])[..., None]) & (weights > 0)
    # rounding can leave none; then it is the last that has weight
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, axis=-1), axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)


def _search(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The mask of what `truncate` keeps, by bisection over the whole vocabulary."""
    order = _sortable(logits)

    def by_count():
        return _leading(order, jnp.ones(logits.shape, jnp.float32), jnp.broadcast_to(top_k, logits.shape[:-1]))

    first = jax.lax.cond(top_k < logits.shape[-1], by_count, lambda: jnp.ones(logits.shape, bool))
    weights = jnp.where(first, jnp.exp(logits), 0)
    return first & (_leading(order, weights, top_p * weights.sum(axis=-1)) | (top_p >= 1))


def _sortable(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats; 0.0 and -0.0 are equal."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Bits of positive floats are in the floats' order, those of negative ones in reverse: they are inverted.
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _leading(order: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mask of the leading ids: the fewest whose weights reach `wanted`.

    By bisection over the bits of the sort key, then over the ids among equal keys; sorting the vocabulary takes several
    times as long.
    """

    def weigh(mask):
        return jnp.where(mask, weights, 0).sum(axis=-1)

    # the largest key such that it and all larger ones reach `wanted`
    key = _largest(lambda key: weigh(order >= key[..., None]) >= wanted, wanted.shape, 32)
    above = order > key[..., None]
    equal = order == key[..., None]
    missing = wanted - weigh(above)
    ids = jnp.arange(order.shape[-1], dtype=jnp.uint32)
    # the last id that is needed among the equal ones: with those before it, the weight is too small
    last = _largest(
        lambda last: weigh(equal & (ids < last[..., None])) < missing, key.shape, order.shape[-1].bit_length()
    )
    return above | (equal & (ids <= last[..., None]))


def _largest(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], bits: int) -> jax.Array:
    """The largest number of `bits` bits for which `holds` is true; it must be true up to some number, then false."""

    def step(i, largest):
        tried = largest | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(tried), tried, largest)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros(shape, jnp.uint32))
