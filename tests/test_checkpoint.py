"""Checkpoints: exact, laid out anew on another mesh, and clear about what does not fit."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from storm_jax import checkpoint
from storm_jax.checkpoint import CheckpointError, Checkpoints
from storm_jax.config import CheckpointConfig, MeshConfig
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import abstract_state, init_state
from tests.tiny import run_config

ROOT = Path(__file__).resolve().parents[1]


def setup(config, devices: int, mesh: MeshConfig):
    model = StormModel(config.model)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    parts = trainable_parts(config.train.optimizer)
    return model, optimizer, parts, make_mesh(mesh, jax.devices()[:devices])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = run_config()
    state = init_state(*setup(config, 8, MeshConfig(2, 2, 2)), seed=3)
    workdir = tmp_path_factory.mktemp("run")
    store = Checkpoints(workdir, CheckpointConfig(every=1, keep=2))
    for step in (1, 2, 3):
        store.save(state, step, config, "abc")
    store.close()
    return workdir, config, jax.tree.map(np.asarray, state)


def test_keeps_the_newest(saved):
    folder, step = checkpoint.find(saved[0])
    assert step == 3
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    assert Checkpoints(saved[0], CheckpointConfig(every=1)).fingerprint(3) == "abc"


def test_restores_exactly_on_another_mesh(saved):
    workdir, config, state = saved
    abstract = abstract_state(*setup(config, 4, MeshConfig(1, 4, 1)))
    restored = Checkpoints(workdir, config.train.checkpoint).restore(abstract, 3)
    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    layouts = jax.tree.map(
        lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), restored, abstract
    )
    assert all(jax.tree.leaves(layouts))


def test_config_travels_along(saved):
    assert checkpoint.read_config(saved[0]) == saved[1]
    assert checkpoint.read_config(saved[0] / "checkpoints" / "2") == saved[1]


def test_single_parts_can_be_read(saved):
    workdir, config, state = saved
    abstract = StormModel(config.model).abstract()["temporal"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    params = checkpoint.load_params(workdir, {"temporal": abstract})
    assert set(params) == {"temporal"}
    jax.tree.map(np.testing.assert_array_equal, params["temporal"], state.params["temporal"])


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.decoder.mlp", 96, r"decoder/blocks/layers/down/weight is \(2, 128, 64\) there and"),
        ("model.temporal.layers", 0, "has parameter temporal/.*, this model has not"),
        ("model.decoder.qk_norm", False, "has parameter decoder/blocks/layers/key_norm/scale"),
        ("model.decoder.qkv_bias", True, "lacks parameter decoder/blocks/layers/key/bias"),
    ],
)
def test_another_architecture_names_the_first_difference(saved, field, value, message):
    abstract = abstract_state(*setup(run_config(**{field: value}), 1, MeshConfig(1, 1, 1)))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(saved[0], CheckpointConfig(every=1)).restore(abstract, 3)


def test_other_frozen_parts_are_explained(saved):
    config = run_config(**{"train.optimizer.rates.vit": 0.0})
    abstract = abstract_state(*setup(config, 1, MeshConfig(1, 1, 1)))
    with pytest.raises(CheckpointError, match="another optimizer state.*init_from"):
        Checkpoints(saved[0], CheckpointConfig(every=1)).restore(abstract, 3)


def test_missing_checkpoints(saved, tmp_path):
    with pytest.raises(CheckpointError, match="give a training workdir"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint at .*9; .*\[2, 3\]"):
        checkpoint.find(saved[0] / "checkpoints" / "9")


@pytest.fixture
def one(saved, tmp_path):
    """A workdir with checkpoint 5, and a way to save more."""
    config, arrays = saved[1], saved[2]
    state = jax.tree.map(jax.numpy.asarray, arrays)

    def save(*steps: int, keep: int = 3):
        store = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=keep))
        try:
            for step in steps:
                store.save(state, step, config, "abc")
        finally:
            store.close()

    save(5)
    return tmp_path, save


def names(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_half_written_checkpoint_is_not_found_and_removed(one):
    """What a kill in mid-save leaves behind: a temporary folder."""
    workdir, save = one
    (workdir / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert checkpoint.find(workdir)[1] == 5
    assert "6.orbax-checkpoint-tmp" in names(workdir)  # whoever only reads removes nothing
    save(6)
    assert names(workdir) == ["5", "6"]


def test_half_removed_checkpoint_does_no_harm(one, saved):
    """What a kill leaves behind while an old one is removed."""
    workdir, save = one
    save(6)
    old = workdir / "checkpoints" / "5"
    (old / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(old / "state" / "d")
    store = Checkpoints(workdir, CheckpointConfig(every=1, keep=2))
    assert store.latest() == 6 and store.fingerprint(6) == "abc"
    abstract = abstract_state(*setup(saved[1], 8, MeshConfig(2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, store.restore(abstract, 6), saved[2])
    store.close()
    save(7, keep=2)
    assert names(workdir) == ["6", "7"]


def test_a_save_that_fails_is_told_and_loses_nothing(one):
    """The disk takes no more than a few kilobytes of a file."""
    workdir, save = one
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written to .*checkpoints: .*whole"):
            save(6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.find(workdir)[1] == 5
    save(6)
    assert names(workdir) == ["5", "6"]


def test_an_error_lets_a_save_finish(saved, tmp_path):
    config, state = saved[1], jax.tree.map(jax.numpy.asarray, saved[2])
    store = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(KeyError), store.closed_after():
        store.save(state, 4, config, "abc")
        raise KeyError
    assert names(tmp_path) == ["4"]


def test_layout_version_is_checked(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAYOUT", 2)
    with pytest.raises(CheckpointError, match="layout version 1, this storm_jax reads version 2"):
        checkpoint.read_config(saved[0])


def test_metadata_is_plain_json(saved):
    text = (saved[0] / "checkpoints" / "3" / "_CHECKPOINT_METADATA").read_text()
    assert json.loads(text)["custom_metadata"]["config"]["name"] == "debug_tiny"


ONE_BY_ONE = """
import pathlib, re, sys
import numpy as np
from storm_jax.checkpoint import save_parameters
from storm_jax.interop.load import aligned
from tests.tiny import run_config

SIZE = 300_000_000

def resident(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])

def parameters(count):
    for i in range(count):
        value = aligned((100, SIZE // 400), np.dtype(np.float32))
        value[...] = np.arange(i, i + value.shape[1], dtype=np.float32)
        yield f"vit/{i}/weight", value
        del value

save_parameters(sys.argv[1] + "/small", [("vit/weight", np.ones(3, np.float32))], run_config())
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
save_parameters(sys.argv[1] + "/large", parameters(4), run_config())
print((resident("VmHWM") - before) / SIZE)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_parameters_come_and_go_one_by_one(tmp_path):
    """Memory of a process that writes 4 of 300 MB: one of them."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
    names = [f"vit/{i}/weight" for i in range(4)]
    for i, value in enumerate(checkpoint.parameters(tmp_path / "large", names)):
        assert value.shape == (100, 750_000) and value[7, 5] == i + 5 and value[-1, 0] == i
