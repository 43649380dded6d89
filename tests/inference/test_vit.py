"""The ViT that answers, with the attention kernel of GPUs in the emulator and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from storm_jax.config import MeshConfig, VitConfig
from storm_jax.inference import vit as inference
from storm_jax.models.vit import Vit
from storm_jax.parallel.mesh import make_mesh
from storm_kernels.attention import gpu
from tests.kernels.gpu_emulation import emulated_gpu, recorded_launches  # noqa: F401

pytest.importorskip("triton")

# Heads of 72 channels, 25 patches.
CONFIG = VitConfig(
    image_size=70, patch_size=14, width=144, mlp=64, layers=2, heads=2, position_grid=5,
    position_scale=0.02,
)  # fmt: skip
FRAMES = np.random.default_rng(0).integers(0, 256, (8, 70, 70, 3), dtype=np.uint8)


def encoder(devices, dtype=jnp.bfloat16):
    """A jitted function of frames, on a mesh of so many devices."""
    mesh = make_mesh(MeshConfig(data=1, tensor=-1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = nnx.to_pure_dict(nnx.state(Vit(CONFIG, nnx.Rngs(0))))
        rest, layers = inference.prepare(params, CONFIG, jnp.dtype(dtype))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))

    @jax.jit
    def encode(layers, rest, frames):
        model = Vit(CONFIG, nnx.Rngs(0))
        state = nnx.state(model)
        nnx.replace_by_pure_dict(state, {**rest, "blocks": params["blocks"]})
        nnx.update(model, state)
        return inference.encode(model, layers, frames, jnp.dtype(dtype))

    def run(frames, only_trace=False):
        with jax.set_mesh(mesh):
            call = encode.trace if only_trace else encode
            return call(layers, rest, jax.device_put(frames, split))

    return run


def difference(x, y):
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_kernel_changes_nothing_but_roundings(devices, emulated_gpu, monkeypatch):  # noqa: F811
    exact = encoder(devices, jnp.float32)(FRAMES)
    plain = encoder(devices)(FRAMES)
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)
    fused = encoder(devices)(FRAMES)
    assert fused.sharding == plain.sharding
    assert difference(fused, plain) > 0
    assert difference(fused, exact) < 1.05 * difference(plain, exact)
    assert difference(plain, exact) < 2**-6


def test_one_launch_a_layer_where_it_serves(monkeypatch):
    monkeypatch.setattr(gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(gpu, "_device_unsupported", lambda: None)
    with recorded_launches() as launches:
        encoder(1)(FRAMES, only_trace=True)
    assert [(x.name, x.grid) for x in launches] == [("attention_forward", (1, 2, 8))] * 2
