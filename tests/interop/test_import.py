"""Weights that transformers wrote, imported: equal number for number, whatever their spelling."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from storm_jax import checkpoint, convert
from storm_jax.checkpoint import CheckpointError
from storm_jax.config import ConfigError, MeshConfig
from storm_jax.interop import architecture
from storm_jax.interop.files import WeightsError, resolve
from storm_jax.interop.names import Form, Name, storm_names
from storm_jax.models.decoder import Decoder
from storm_jax.models.storm import StormModel
from storm_jax.models.vit import resize_positions
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params
from tests.models.references import decoder_params, randomise, vit_params, with_params
from tests.tiny import run_config, tiny_model

torch = pytest.importorskip("torch")
import transformers as hf  # noqa: E402

VIT = dict(
    image_size=28, patch_size=7, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, attn_implementation="eager",
)  # fmt: skip
TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, attn_implementation="eager",
    pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GEMMA3 = dict(
    num_hidden_layers=6, head_dim=12, query_pre_attn_scalar=7, sliding_window=5,
    sliding_window_pattern=3, rope_scaling={"factor": 8.0, "rope_type": "linear"},
)  # fmt: skip


def gemma1():
    config = hf.GemmaConfig(**TEXT, num_hidden_layers=2, head_dim=12)
    return hf.GemmaForCausalLM(config)


def gemma2():
    config = hf.Gemma2Config(
        **TEXT, num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=10, sliding_window=5,
        attn_logit_softcapping=1.5, final_logit_softcapping=2.0,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def gemma3():
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, **GEMMA3))


def qwen2(tied=False):
    config = hf.Qwen2Config(**TEXT, num_hidden_layers=3, tie_word_embeddings=tied)
    return hf.Qwen2ForCausalLM(config)


DECODERS = {
    "gemma1": gemma1,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "qwen2": qwen2,
    "qwen2_tied": lambda: qwen2(tied=True),
}


def siglip():
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT))


def run(vit=None, decoder=None, **changes):
    """A run whose model has these parts."""
    base = run_config()
    model = tiny_model()
    parts = {}
    if vit is not None:
        parts["vit"] = dataclasses.replace(
            model.vit, image_size=28, patch_size=7, width=32, mlp=40, layers=3, heads=4,
            position_grid=4, **vit,
        )  # fmt: skip
    if decoder is not None:
        parts["decoder"] = decoder
    return dataclasses.replace(base, model=dataclasses.replace(model, **parts), **changes)


def saved(model, folder, **options):
    """transformers' own files, in float32, several small shards."""
    model.save_pretrained(folder, max_shard_size="20KB", **options)
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    return str(folder)


def loaded(config, written, part):
    """A part of a checkpoint as `--config.init_from` reads it."""
    abstract = abstract_params(StormModel(config.model), make_mesh(config.mesh))
    return checkpoint.load_params(written, {part: abstract[part]})[part]


def assert_same(ours, expected):
    ours, expected = (nnx.traversals.flatten_mapping(tree) for tree in (ours, expected))
    assert set(ours) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(ours[path], np.float32), value, str(path))


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family, tmp_path):
    reference = randomise(DECODERS[family]())
    folder = saved(reference, tmp_path / "hf")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    config = run(decoder=found)
    convert.import_weights(config, str(tmp_path / "out"), decoder=folder)
    params = loaded(config, tmp_path / "out", "decoder")
    assert_same(params, decoder_params(reference, found))
    # The architecture was read right: the logits are those of transformers.
    ids = np.random.default_rng(0).integers(0, 61, (2, 17))
    params = jax.tree.map(jnp.asarray, jax.device_get(params))  # on one device
    decoder = with_params(lambda: Decoder(found, nnx.Rngs(0)), params)
    positions = jnp.tile(jnp.arange(17), (2, 1))
    with jax.default_matmul_precision("highest"):
        hidden = decoder(decoder.embed(jnp.asarray(ids), jnp.float32), positions)
        logits = decoder.logits(hidden)
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("output_layer", [-1, -2])
def test_vit(output_layer, tmp_path):
    reference = randomise(siglip())
    folder = saved(reference, tmp_path / "hf")
    config = run(vit=dict(output_layer=output_layer))
    convert.import_weights(config, str(tmp_path / "out"), vit=folder)
    expected = vit_params(reference, 4 + output_layer, final_norm=output_layer == -1)
    assert_same(loaded(config, tmp_path / "out", "vit"), expected)


@pytest.mark.parametrize(
    "prefix", ["vision_model.", "vision_tower.", "model.vision_tower.vision_model."]
)
def test_vit_under_other_names(prefix, tmp_path):
    reference = randomise(siglip())
    reference.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    with safe_open(path, framework="np") as file:
        tensors = {prefix + name: file.get_tensor(name) for name in file.keys()}
    # What stands beside a tower, and buffers of old files, are nobody's.
    tensors["logit_scale"] = np.zeros(1, np.float32)
    tensors["text_model.embeddings.position_ids"] = np.arange(3)
    tensors[prefix + "embeddings.position_ids"] = np.arange(16)
    save_file(tensors, path)
    config = run(vit={})
    convert.import_weights(config, str(tmp_path / "out"), vit=str(tmp_path / "hf"))
    assert_same(loaded(config, tmp_path / "out", "vit"), vit_params(reference, 3, True))


def test_a_larger_model_gives_tower_and_decoder(tmp_path):
    text = hf.Gemma3TextConfig(**TEXT, **GEMMA3)
    vision = hf.SiglipVisionConfig(**VIT, vision_use_head=False)
    whole = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    folder = saved(randomise(whole), tmp_path / "hf")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    config = run(vit={}, decoder=found)
    convert.import_weights(config, str(tmp_path / "out"), vit=folder, decoder=folder)
    # What transformers itself takes out of the same files.
    text_model = hf.Gemma3ForCausalLM(text)
    text_model.model.load_state_dict(whole.model.language_model.state_dict())
    expected = decoder_params(text_model, found)
    assert_same(loaded(config, tmp_path / "out", "decoder"), expected)
    tower = whole.model.vision_tower
    assert_same(loaded(config, tmp_path / "out", "vit"), vit_params(tower, 3, True))


def test_paligemma_and_qwen2_vl(tmp_path):
    vision = hf.SiglipVisionConfig(**VIT, vision_use_head=False)
    text = hf.GemmaConfig(**TEXT, num_hidden_layers=2, head_dim=12)
    whole = hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    )
    folder = saved(randomise(whole), tmp_path / "pali")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    config = run(vit={}, decoder=found)
    convert.import_weights(config, str(tmp_path / "out"), vit=folder, decoder=folder)
    alone = hf.GemmaForCausalLM(text)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    assert_same(loaded(config, tmp_path / "out", "decoder"), decoder_params(alone, found))
    tower = vit_params(whole.model.vision_tower, 3, True)
    assert_same(loaded(config, tmp_path / "out", "vit"), tower)

    text = dict(TEXT, num_hidden_layers=2)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    qwen = hf.Qwen2VLConfig(
        text_config=dict(text, rope_parameters=rope),
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32),
        tie_word_embeddings=False,
    )
    whole = hf.Qwen2VLForConditionalGeneration(qwen)
    folder = saved(randomise(whole), tmp_path / "qwen")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    config = run(decoder=found)
    convert.import_weights(config, str(tmp_path / "qwen_out"), decoder=folder)
    alone = hf.Qwen2ForCausalLM(hf.Qwen2Config(**text, tie_word_embeddings=False))
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    assert_same(loaded(config, tmp_path / "qwen_out", "decoder"), decoder_params(alone, found))


def test_a_folder_for_each_part(tmp_path):
    """As VILA saves it: vision_tower/ and llm/ under a configuration that transformers lacks."""
    tower, language = randomise(siglip()), randomise(qwen2())
    saved(tower, tmp_path / "vila" / "vision_tower")
    saved(language, tmp_path / "vila" / "llm")
    (tmp_path / "vila" / "config.json").write_text('{"model_type": "llava_llama"}')
    found = architecture.decoder_config(language.config)
    config = run(vit=dict(output_layer=-2), decoder=found)
    folder = str(tmp_path / "vila")
    convert.import_weights(config, str(tmp_path / "out"), vit=folder, decoder=folder)
    decoder = loaded(config, tmp_path / "out", "decoder")
    assert_same(decoder, decoder_params(language, found))
    assert_same(loaded(config, tmp_path / "out", "vit"), vit_params(tower, 2, False))


def test_bfloat16_stays_and_any_mesh_takes_it(tmp_path):
    reference = randomise(gemma2()).to(torch.bfloat16)
    folder = saved(reference, tmp_path / "hf")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    config = run(decoder=found)
    convert.import_weights(config, str(tmp_path / "out"), decoder=folder)
    assert {dtype for _, dtype in checkpoint.describe(tmp_path / "out")[1].values()} == {"bfloat16"}
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    abstract = abstract_params(StormModel(config.model), mesh, jnp.dtype("bfloat16"))["decoder"]
    params = checkpoint.load_params(tmp_path / "out", {"decoder": abstract})["decoder"]
    expected = nnx.traversals.flatten_mapping(decoder_params(reference.float(), found))
    for path, value in nnx.traversals.flatten_mapping(params).items():
        assert value.dtype == jnp.bfloat16
        assert value.sharding == nnx.traversals.flatten_mapping(abstract)[path].sharding
        np.testing.assert_array_equal(np.asarray(value, np.float32), expected[path])
    assert any(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(params))


def test_positions_are_resized_to_the_resolution_of_the_run(tmp_path, capsys):
    reference = randomise(siglip())
    folder = saved(reference, tmp_path / "hf")
    config = run(vit={})
    vit = dataclasses.replace(config.model.vit, image_size=42, position_grid=6)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vit=vit))
    convert.import_weights(config, str(tmp_path / "out"), vit=folder)
    assert "resized from 4 x 4 to 6 x 6" in capsys.readouterr().err
    table = reference.embeddings.position_embedding.weight.detach()
    square = table.T.reshape(1, 32, 4, 4)
    expected = torch.nn.functional.interpolate(square, size=(6, 6), mode="bicubic")
    got = loaded(config, tmp_path / "out", "vit")["positions"]
    np.testing.assert_allclose(got, expected.reshape(32, 36).T.numpy(), atol=1e-6)
    np.testing.assert_array_equal(got, resize_positions(jnp.asarray(table.numpy()), 6))


@pytest.mark.parametrize("parts", [{}, {"temporal": {"layers": 0}, "projector": {"norm": False}}])
def test_every_form_has_an_inverse(parts):
    rng = np.random.default_rng(0)
    model = tiny_model(**parts)
    flat = nnx.traversals.flatten_mapping(StormModel(model).abstract(), sep="/")
    table = storm_names(model)
    assert set(flat) == {name.ours for name in table}
    assert len({name.hf for name in table}) == len(table)
    forms = {name.form for name in table}
    assert forms == set(get_args(Form)) - (set() if model.temporal.layers else {"taps"})
    for name in table:
        shape = flat[name.ours].shape[1:] if name.stacked else flat[name.ours].shape
        x = rng.normal(size=shape)
        there = name.to_hf(x)
        assert there.shape == name.hf_shape(shape)
        np.testing.assert_array_equal(name.to_ours(there, shape), x)
    with pytest.raises(ValueError, match=r"^has shape \(3, 2\), this model needs \(2, 3\)"):
        Name("a/weight", "w", "linear").to_ours(np.zeros((3, 2)), (3, 2))


def test_mistakes_are_named(tmp_path):
    reference = randomise(qwen2())
    folder = Path(saved(reference, tmp_path / "hf"))
    found = architecture.decoder_config(architecture.read(folder))
    config = run(decoder=found)

    def attempt(match, error=WeightsError, config=config, out="out", **given):
        with pytest.raises(error, match=match):
            convert.import_weights(config, str(tmp_path / out), **given)
        assert not (tmp_path / out / "checkpoints").exists()

    attempt("give --vit, --decoder")
    attempt("give the path of a local folder", decoder=str(tmp_path / "nothing here"))
    attempt("no SigLIP vision tower", ConfigError, vit=str(folder))
    other = dataclasses.replace(found, mlp=64, kv_heads=1)
    attempt(
        r"kv_heads: 2 in config.json, 1 in --config\n.*mlp: 48 in config.json, 64",
        ConfigError, run(decoder=other), decoder=str(folder),
    )  # fmt: skip
    # Names without a counterpart, on both sides and all at once.
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = content["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    content["weight_map"]["model.layers.1.mlp.extra.weight"] = moved
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / index.name).write_text(json.dumps(content))
    attempt(
        r"missing: model.layers.1.mlp.up_proj.weight\n"
        r"  without a place in this model: model.layers.1.mlp.extra.weight",
        decoder=str(broken),
    )
    (broken / moved).unlink()
    attempt(f"names files that are not there: {moved}", decoder=str(broken))
    (broken / "config.json").unlink()
    attempt("has no config.json", ConfigError, decoder=str(broken))
    # Nothing is overwritten.
    convert.import_weights(config, str(tmp_path / "out"), decoder=str(folder))
    with pytest.raises(CheckpointError, match="exists; give a new folder"):
        convert.import_weights(config, str(tmp_path / "out"), decoder=str(folder))


def test_another_family_is_refused():
    with pytest.raises(ConfigError, match="'llama' is no decoder that can be imported; gemma, "):
        architecture.decoder_config(hf.LlamaConfig())


@pytest.mark.parametrize(
    "content", ['{"model_type": "gemma2", "hidden_size": 30, "num_attention_heads": 4}', "{", "{}"]
)
def test_a_broken_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: "):
        architecture.read(tmp_path)


def test_inspect_shows_both_kinds(tmp_path):
    folder = saved(randomise(qwen2()), tmp_path / "hf")
    found = architecture.decoder_config(architecture.read(Path(folder)))
    convert.import_weights(run(decoder=found), str(tmp_path / "out"), decoder=folder)
    ours, theirs = convert.inspect(str(tmp_path / "out")), convert.inspect(folder)
    assert "decoder/blocks/layers/query/weight" in ours and "3x32x4x8" in ours
    assert '"vocab_size": 61' in ours
    assert "model.layers.2.self_attn.q_proj.weight" in theirs and "32x32" in theirs
    # The same numbers in the same bytes.
    totals = [next(x for x in t.splitlines() if "tensors," in x) for t in (ours, theirs)]
    assert totals[0].split("tensors,")[1] == totals[1].split("tensors,")[1]
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        convert.inspect(str(tmp_path))
    assert resolve(folder) == Path(folder)
