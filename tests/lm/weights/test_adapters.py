"""Adapters in the layout of the `peft` library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from kd_jax.lm import model, weights
from kd_jax.lm.model import Model, lora
from kd_jax.lm.model.lora import Lora
from kd_jax.lm.weights import adapters as adapters_lib
from tests.golden import families
from tests.lm.weights.checkpoints import TINY

SETTINGS = Lora(rank=3, alpha=6.0, targets=("q", "v", "down"))


def random_adapters(architecture):
    random = np.random.RandomState(0)
    new = lora.init(jax.random.key(0), architecture, SETTINGS)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape), jnp.float32), new)


@pytest.mark.slow
def test_adapter_folder(tmp_path):
    adapters = random_adapters(TINY)
    adapters_lib.export(adapters, SETTINGS, TINY, tmp_path / "out", base="org/tiny")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "org/tiny"
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * TINY.num_hidden_layers
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    np.testing.assert_array_equal(stored[name.format("A")], adapters["down"]["a"][2])
    np.testing.assert_array_equal(stored[name.format("B")], adapters["down"]["b"][2])
    with pytest.raises(FileExistsError):
        adapters_lib.export(adapters, SETTINGS, TINY, tmp_path / "out", base="org/tiny")


def test_adapters_of_fused_projections_are_not_exported(tmp_path):
    phi = weights.load(families.write_folder("phi 3", tmp_path / "m")).architecture
    with pytest.raises(ValueError, match="phi3 fuses q, v: export the merged model"):
        adapters_lib.export({}, SETTINGS, phi, tmp_path / "out", base="x")


@pytest.mark.parity
def test_peft_reads_them_to_equal_logits(tmp_path):
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(1), TINY)
    adapters = random_adapters(TINY)
    weights.export(Model(TINY, params), tmp_path / "base")
    adapters_lib.export(adapters, SETTINGS, TINY, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = np.random.RandomState(0).randint(0, TINY.vocab_size, (1, 20))
    with torch.inference_mode():
        logits = theirs(torch.as_tensor(ids)).logits.numpy()
    attached = lora.attached(params, adapters, SETTINGS)
    ours = model.logits(attached, TINY, model.forward(attached, TINY, ids))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5)
