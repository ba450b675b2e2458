import os

import pytest

from kd_jax.lm import weights
from kd_jax.lm.model import Architecture
from tests.lm.weights.checkpoints import (
    BLOCKS,
    TINY,
    assert_params,
    gguf_tensors,
    run_python,
    tensors_of,
    write_folder,
    write_gguf,
)


@pytest.mark.long
def test_layouts_over_eight_devices(tmp_path):
    model = weights.load(write_folder(tmp_path / "source"))
    write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS), kind="Q8_0")
    weights.save(model, tmp_path / "by one")
    script = """
        import sys
        from pathlib import Path

        import jax
        import numpy as np

        from kd_jax.parallel import mesh as mesh_lib
        from kd_jax.lm.weights import hf_files
        from kd_jax.lm import model as model_lib, weights

        folder, sizes = Path(sys.argv[1]), []
        open_folder = hf_files.open_folder

        def watched(path):
            stored = open_folder(path)

            def read(*where):
                part = stored.read(*where)
                sizes.append((where[0], part.shape))
                return part

            return stored._replace(read=read)

        hf_files.open_folder = watched
        devices = jax.devices()
        assert len(devices) == 8
        layouts = [(2, 2, 2, 8), (4, 2, 1, 8), (1, 1, 2, 2), (1, 4, 1, 4), (1, 1, 1, 1)]
        for source, some in {"source": layouts, "m.gguf": layouts[:2], "by one": layouts[::3]}.items():
            plain = weights.load(folder / source)
            assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(plain.params))
            expected = weights.fingerprint(plain.params)
            for data, fsdp, tensor, count in some:
                mesh = mesh_lib.make(data, fsdp, tensor, devices[:count])
                sizes.clear()
                model = weights.load(folder / source, mesh=mesh)
                axes = model_lib.logical_axes(model.architecture)
                wanted = mesh_lib.shardings(axes, model_lib.abstract(model.architecture), mesh)
                trees = model.params, plain.params, wanted
                for leaf, one, sharding in zip(*map(jax.tree.leaves, trees), strict=True):
                    assert leaf.sharding == sharding and leaf.dtype == one.dtype
                    for shard in leaf.addressable_shards:
                        np.testing.assert_array_equal(shard.data, np.asarray(one)[shard.index])
                if count == 8 and source != "m.gguf":
                    assert weights.fingerprint(model.params) == expected
                if source == "source":
                    # each part is read once, and no more than that part
                    parts = fsdp * tensor
                    assert [size for size in sizes if size[0] == "q"] == [("q", (64 // tensor, 48 // fsdp))] * 3 * parts
                if source == "source" and count == 8:
                    weights.save(model, folder / f"by eight {data}")
                    weights.export(model, folder / f"exported by eight {data}")
        try:
            weights.load(folder / "source", mesh=mesh_lib.make(1, 7, 1, devices[:7]))
        except ValueError as error:
            print(error)
    """
    said = run_python(script, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    assert "of size 48 cannot be split over fsdp = 7 devices" in said
    # this process has other devices than the one that saved
    for name in ("by eight 2", "by eight 4", "exported by eight 2", "exported by eight 4"):
        assert_params(weights.load(tmp_path / name).params, tensors_of(TINY))


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_there_is_no_second_copy_on_the_host(tmp_path):
    # 166 MB; the largest stacked weight is a fourth of it
    architecture = Architecture(4096, 512, 1280, 16, 8, 2, 64, 10000.0)
    write_folder(tmp_path / "hf", architecture=architecture)
    weights.save(weights.load(tmp_path / "hf"), tmp_path / "ours")
    script = """
        import sys

        import jax
        import jax.numpy as jnp

        from kd_jax.parallel import mesh
        from kd_jax.lm import weights

        def status(key):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

        jax.block_until_ready(jnp.zeros(()))
        # twice: the first time what is compiled counts too
        for _ in range(2):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
            before = status("VmRSS:")
            model = weights.load(sys.argv[1], mesh=mesh.make(1, 1, 1))
            print((status("VmHWM:") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
            del model
    """
    assert float(run_python(script, tmp_path / "hf").split()[0]) < 1.6
    # orbax has a weight twice while it reads it
    assert float(run_python(script, tmp_path / "ours").split()[1]) < 2.1
