"""`convert check`: agreement is seen, and where it ends is named."""

import contextlib
import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from storm_jax import checkpoint, convert
from storm_jax.checkpoint import CheckpointError
from storm_jax.interop import check
from storm_jax.interop.files import INDEX, WeightsError
from tests.commands.conftest import Command
from tests.interop import exported
from tests.interop.exported import model_of

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    model = model_of("gemma3", "temporal+sampling", vit=dict(exported.VIT, frames_per_call=2))
    return exported.export(model, tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def wrong(there):
    """Compares with the export as it is now: the stages above 1e-4."""
    config = there.run.model
    sent = check.probe(config)
    ours = check.run_ours(config, there.params, sent)

    def compare():
        return check.above(check.compare(ours, check.run_theirs(there.folder, sent)), 1e-4)

    return compare


@contextlib.contextmanager
def changed(folder, name, change):
    """Changes a tensor of an export for a while."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    before = path.read_bytes()
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        yield
    finally:
        path.write_bytes(before)


def test_every_stage_agrees(there, capsys):
    assert convert.check_export(str(there.checkpoint), there.folder, 2e-6) == []
    lines = capsys.readouterr().out.splitlines()[1:]
    stages = check.stage_names(there.run.model)
    assert [line[:20].strip() for line in lines] == stages
    assert [s for s in stages if s[-1] not in "0123456789"] == [
        "patches", "vit norm", "projector", "reduction", "embeddings", "decoder norm", "logits",
    ]  # fmt: skip
    # Each is a stage of numbers, and not one of them is computed bit for bit the same.
    assert all(float(line.split()[-2]) > 0.1 for line in lines)
    assert sum(float(line.split()[-3]) > 0 for line in lines) > len(lines) // 2


def test_rounding_for_the_export_is_no_error(there, tmp_path):
    convert.export_weights(str(there.checkpoint), tmp_path / "half", dtype="bfloat16")
    assert convert.check_export(str(there.checkpoint), tmp_path / "half", 2e-6) == []


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("vision_tower.embeddings.position_embedding.weight", "patches"),
        ("vision_tower.encoder.layers.1.self_attn.v_proj.bias", "vit layer 1"),
        ("vision_tower.post_layernorm.bias", "vit norm"),
        ("projector.norm.weight", "projector"),
        ("temporal.layers.1.backward_direction.A_log", "mamba layer 1"),
        ("language_model.model.embed_tokens.weight", "embeddings"),
        ("language_model.model.layers.2.self_attn.q_norm.weight", "decoder layer 2"),
        ("language_model.model.norm.weight", "decoder norm"),
    ],
)
def test_the_stage_of_a_wrong_tensor_is_named(there, wrong, name, stage):
    with changed(there.folder, name, lambda x: x + 0.5 * np.sign(x)):
        found = wrong()
    assert found[0].stage == stage
    stages = check.stage_names(there.run.model)
    # (A wrong embedding does not show in a stage before the decoder, and so on.)
    assert {e.stage for e in found} <= set(stages[stages.index(stage) :])
    assert found[-1].stage == "logits"


def test_a_reduction_that_differs_and_numbers_that_are_none(there, wrong):
    config = there.folder / "config.json"
    text = config.read_text()
    settings = json.loads(text)
    config.write_text(json.dumps(settings | {"temporal_sampling": 1, "temporal_pool": 4}))
    try:
        found = wrong()
    finally:
        config.write_text(text)
    assert found[0].stage == "reduction"
    name = "temporal.layers.0.out_proj.weight"
    with changed(there.folder, name, lambda x: np.where(x > 0, np.nan, x)):
        found = wrong()
    assert found[0].stage == "mamba layer 0" and np.isnan(found[0].error)


def test_other_models_and_folders_are_named(there, tmp_path):
    with pytest.raises(convert.ConfigError, match="is no export of storm_jax"):
        convert.check_export(str(there.checkpoint), tmp_path, 1e-4)
    with pytest.raises(WeightsError, match="transformers cannot load"):
        check.run_theirs(tmp_path, check.probe(there.run.model))
    other = model_of("gemma3", "temporal+sampling", temporal=dict(layers=1))
    checkpoint.save_params(tmp_path / "1", exported.random_params(other), exported.run_of(other))
    with pytest.raises(WeightsError, match="of different models: mamba layer 1"):
        convert.check_export(str(tmp_path / "1"), there.folder, 1e-4)
    ours = {"patches": np.zeros(3, np.float32)}
    with pytest.raises(WeightsError, match="of different models: patches"):
        check.compare(ours, {"patches": np.zeros(4, np.float32)})


def test_without_pytorch_the_extra_is_named(there, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"check needs PyTorch: .*storm_jax\[torch\]"):
        check.run_theirs(there.folder, check.probe(there.run.model))


def test_export_refuses_before_it_writes(there, tmp_path):
    def attempt(match, source, out="out", error=CheckpointError):
        with pytest.raises(error, match=match):
            convert.export_weights(str(source), tmp_path / out)

    attempt("no checkpoint at", tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    attempt("is not empty; give a new folder", there.checkpoint, "full")
    part = {"vit": there.params["vit"], "extra": {"w": np.zeros(2, np.float32)}}
    checkpoint.save_params(tmp_path / "part", part, there.run)
    attempt(
        r"not hold a whole model:\n  missing: decoder/(.|\n)*without a name there: extra/w",
        tmp_path / "part",
        error=WeightsError,
    )
    assert not (tmp_path / "out" / "config.json").exists()
    decoder = dataclasses.replace(there.run.model.decoder, attention_softcap=3.0)
    model = dataclasses.replace(there.run.model, decoder=decoder)
    checkpoint.save_params(tmp_path / "capped", there.params, exported.run_of(model))
    attempt("decoder.attention_softcap=3.0", tmp_path / "capped", "none", convert.ConfigError)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_commands(there, tmp_path):
    given = f"--checkpoint={there.checkpoint}", f"--out={tmp_path / 'hf'}"
    code, _, err = Command("convert", "export", *given, "--max-shard-size=30KB").finish()
    assert code == 0, err
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    given = f"--checkpoint={there.checkpoint}", f"--hf={tmp_path / 'hf'}"
    code, out, err = Command("convert", "check", *given).finish()
    assert code == 0, err
    assert "mamba layer 1" in out and "logits" in out
    with changed(tmp_path / "hf", "temporal.layers.1.out_proj.weight", lambda x: x * 1.01):
        code, _, err = Command("convert", "check", *given).finish()
    assert code == 1 and "error: mamba layer 1 is the first stage above --limit=0.0001" in err
    given = f"--storm={tmp_path / 'hf'}", f"--out={tmp_path / 'back'}"
    code, _, err = Command("convert", "import", *given).finish()
    assert code == 0, err
    code, out, err = Command("convert", "inspect", str(tmp_path / "back")).finish()
    assert code == 0 and "temporal/blocks/layers/backward/A_log" in out, err
    code, _, err = Command("convert", "export", *given, "--max-shard-size=5").finish()
    assert code == 1 and "needs --checkpoint and --out" in err
