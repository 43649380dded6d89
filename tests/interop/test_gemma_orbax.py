"""Google's Gemma layouts: the same numbers as a transformers model give the same logits.

The trees are written here by hand from the shapes that github.com/google-deepmind/gemma declares,
and its own einsum equations say that they are right.
"""

import dataclasses
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax import checkpoint as orbax

from storm_jax import convert
from storm_jax.config import ConfigError
from storm_jax.interop import architecture
from storm_jax.interop.files import WeightsError
from storm_jax.interop.gemma_names import entries
from storm_jax.interop.gemma_orbax import GemmaCheckpoint
from storm_jax.interop.load import shapes_of
from storm_jax.models.storm import StormModel
from tests.interop.test_parity import compare_decoder, imported, softened
from tests.models.references import decoder_params, randomise
from tests.tiny import run_config

torch = pytest.importorskip("torch")
import transformers as hf  # noqa: E402

COMMON = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=10,
    max_position_embeddings=128, attn_implementation="eager", pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip


def gemma1():
    """As many key-value heads as heads: one einsum for all three."""
    config = hf.GemmaConfig(**COMMON, num_hidden_layers=2, num_key_value_heads=4)
    return hf.GemmaForCausalLM(config)


def gemma2():
    config = hf.Gemma2Config(
        **COMMON, num_hidden_layers=5, num_key_value_heads=2, sliding_window=5,
        query_pre_attn_scalar=10, attn_logit_softcapping=1.5, final_logit_softcapping=2.0,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def gemma3():
    """One key-value head; the last period of attention is not whole."""
    config = hf.Gemma3TextConfig(
        **COMMON, num_hidden_layers=8, num_key_value_heads=1, sliding_window=5,
        query_pre_attn_scalar=10, sliding_window_pattern=3,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )  # fmt: skip
    return hf.Gemma3ForCausalLM(config)


# Model, gating_einsum is [2, mlp, width], layers until the attention repeats itself.
MODELS = {
    "gemma1": (gemma1, False, 1),
    "gemma2 of 2B": (gemma2, False, 2),
    "gemma2 of 9B": (gemma2, True, 2),
    "gemma3": (gemma3, True, 3),
}


def nested(model, transposed_gate) -> dict:
    """A model's numbers as `Transformer.init` of Google's Gemma has them."""
    state = {name: x.detach().numpy() for name, x in model.named_parameters()}
    config = model.config
    D, C = config.hidden_size, config.head_dim
    tree = {
        "embedder": {"input_embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    sandwich = config.model_type != "gemma"
    for i in range(config.num_hidden_layers):
        of = {n.split(f"layers.{i}.")[1]: x for n, x in state.items() if f"layers.{i}." in n}

        def heads(name, of=of):  # Linear [N * H, D] -> [N, D, H]
            return of[f"self_attn.{name}_proj.weight"].reshape(-1, C, D).transpose(0, 2, 1)

        q, k, v = heads("q"), heads("k"), heads("v")
        if len(q) == len(k):
            attn = {"qkv_einsum": {"w": np.stack([q, k, v])}}
        else:
            attn = {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([k, v])}}
        out = of["self_attn.o_proj.weight"].T.reshape(-1, C, D)  # [N, H, D]
        attn["attn_vec_einsum"] = {"w": out}
        if config.model_type == "gemma3_text":
            attn["_query_norm"] = {"scale": of["self_attn.q_norm.weight"]}
            attn["_key_norm"] = {"scale": of["self_attn.k_norm.weight"]}
        gating = np.stack([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]])  # [2, F, D]
        if not transposed_gate:
            gating = gating.transpose(0, 2, 1)
        layer = {
            "attn": attn,
            "mlp": {"gating_einsum": gating, "linear": of["mlp.down_proj.weight"].T},
            "pre_attention_norm": {"scale": of["input_layernorm.weight"]},
        }
        if sandwich:
            layer["post_attention_norm"] = {"scale": of["post_attention_layernorm.weight"]}
            layer["pre_ffw_norm"] = {"scale": of["pre_feedforward_layernorm.weight"]}
            layer["post_ffw_norm"] = {"scale": of["post_feedforward_layernorm.weight"]}
        else:
            layer["pre_ffw_norm"] = {"scale": of["post_attention_layernorm.weight"]}
        tree[f"layer_{i}"] = layer
    return jax.tree.map(np.ascontiguousarray, tree)


def with_vision(tree) -> dict:
    """What stands beside the decoder in the larger Gemma 3."""
    embedder = tree["embedder"] | {
        "mm_input_projection": {"w": np.ones((6, 32), np.float32)},
        "mm_soft_embedding_norm": {"scale": np.ones(6, np.float32)},
    }
    tower = {"siglip_encoder": {"pos_embedding": np.ones((1, 4, 6), np.float32)}}
    return tree | {"embedder": embedder, "vision_encoder": tower}


def flat(tree) -> dict:
    """One level of keys with slashes, one with the parameter's own name."""
    out = {}
    for path, x in nnx.traversals.flatten_mapping(tree).items():
        *path, leaf = path
        if leaf in ("gating_einsum", "linear"):
            path, leaf = [*path, leaf], "w"
        root = ["SigLiPFromPatches_0"] if path[0] == "vision_encoder" else ["transformer", path[0]]
        out.setdefault("/".join([*root, *path[1:]]), {})[leaf] = x
    return out


def stacked(tree, period) -> dict:
    """Layers 0, P, 2P, ... on the first axis of attention_type_0, and so on."""
    groups = {}
    for key, leaves in flat(tree).items():
        parts = key.split("/")
        if parts[1].startswith("layer_"):
            layer = int(parts[1].removeprefix("layer_"))
            middle = f"transformer/stacked_layers/attention_type_{layer % period}"
            key = "/".join([middle, *parts[2:]])
        for leaf, x in leaves.items():
            groups.setdefault((key, leaf), []).append(x)
    out = {}
    for (key, leaf), several in groups.items():
        whole = np.stack(several) if "stacked_layers" in key else several[0]
        out.setdefault(key, {})[leaf] = whole
    return out


def kauldron(tree) -> dict:
    return {
        "params": tree,
        "opt_state": {"mu": {"embedder": {"input_embedding": np.ones(3, np.float32)}}},
        "step": np.int32(7),
        "collections": {},
    }


LAYOUTS = {
    "NESTED": lambda tree, period: tree,
    "FLAT": lambda tree, period: flat(tree),
    "STACKED": stacked,
    "KAULDRON": lambda tree, period: kauldron(tree),
}


def written(tree, folder):
    """As `save_params` of Google's Gemma writes it."""
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def run(decoder, **changes):
    base = run_config()
    model = dataclasses.replace(base.model, decoder=decoder)
    return dataclasses.replace(base, model=model, **changes)


@pytest.mark.parametrize("model", MODELS)
def test_the_trees_here_are_googles(model):
    """Its equations on these arrays give what transformers' modules give."""
    build, transposed, _ = MODELS[model]
    reference = randomise(build())
    tree = nested(reference, transposed)["layer_1"]
    layer = reference.model.layers[1]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 32)).astype(np.float32)

    def theirs(module, x):
        with torch.no_grad():
            return module(torch.as_tensor(x)).numpy()

    def same(got, expected):
        np.testing.assert_allclose(got, expected.reshape(got.shape), atol=1e-5)

    attn, mlp = tree["attn"], tree["mlp"]
    projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    if "qkv_einsum" in attn:
        got = list(np.einsum("BTD,SNDH->SBTNH", x, attn["qkv_einsum"]["w"]))
    else:
        got = [np.einsum("BTD,NDH->BTNH", x, attn["q_einsum"]["w"])]
        got += list(np.einsum("BSD,CKDH->CBSKH", x, attn["kv_einsum"]["w"]))
    for value, module in zip(got, projections, strict=True):
        same(value, theirs(module, x))
    encoded = rng.normal(size=(2, 3, 4, 10)).astype(np.float32)
    got = np.einsum("BTNH,NHD->BTD", encoded, attn["attn_vec_einsum"]["w"])
    same(got, theirs(layer.self_attn.o_proj, encoded.reshape(2, 3, 40)))
    equation = "BTF,NHF->BTNH" if transposed else "BTF,NFH->BTNH"
    gate = np.einsum(equation, x, mlp["gating_einsum"])
    hidden = np.asarray(jax.nn.gelu(gate[..., 0, :])) * gate[..., 1, :]
    same(np.einsum("BTH,HF->BTF", hidden, mlp["linear"]), theirs(layer.mlp, x))


# The parameters drawn with it are less sensitive to the order of sums, which CPUs differ in: states
# of 13 are within 1e-5 of float64 after the first layers, with 0 within 2.2e-5 on one of them.
STEADY = 1


@pytest.mark.parametrize(
    "model, layout",
    [
        pytest.param(m, n, marks=() if m == "gemma3" or n == "NESTED" else pytest.mark.slow)
        for m in MODELS
        for n in LAYOUTS
    ],
)
def test_layouts(model, layout, tmp_path, capsys):
    build, transposed, period = MODELS[model]
    reference = softened(randomise(build(), STEADY))
    tree = nested(reference, transposed)
    if model == "gemma3" and layout != "STACKED":
        tree = with_vision(tree)
    folder = written(LAYOUTS[layout](tree, period), tmp_path / "google")
    config = architecture.decoder_config(reference.config)
    loaded = imported({"decoder": config}, tmp_path / "out", decoder=str(folder))
    assert f"({layout})" in capsys.readouterr().err
    expected = nnx.traversals.flatten_mapping(decoder_params(reference, config))
    got = nnx.traversals.flatten_mapping(loaded.params["decoder"])
    assert set(got) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, str(path))
    if layout == "NESTED":  # the other layouts hold equal parameters
        compare_decoder(reference, loaded, np.random.default_rng(0))


def test_bfloat16_stays(tmp_path):
    reference = randomise(gemma2())
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nested(reference, True))
    folder = written(stacked(tree, 2), tmp_path / "google")
    config = architecture.decoder_config(reference.config)
    shapes = shapes_of(StormModel(run(config).model).abstract()["decoder"])
    source = GemmaCheckpoint(folder)
    params = dict(source.read(source.config(config), shapes))
    expected = decoder_params(reference.to(torch.bfloat16).float(), config)
    expected = nnx.traversals.flatten_mapping(expected, sep="/")
    assert set(params) == set(expected)
    for path, value in expected.items():
        assert params[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params[path].astype(np.float32), value)


def test_one_parameter_at_a_time(tmp_path):
    """Also where a tensor of theirs holds two of ours, gate and up."""
    large = COMMON | dict(hidden_size=256, intermediate_size=1024)
    model = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**large, num_hidden_layers=8, num_key_value_heads=2)
    )
    folder = written(nested(model, True), tmp_path / "google")
    config = architecture.decoder_config(model.config)
    shapes = shapes_of(StormModel(run(config).model).abstract()["decoder"])
    source = GemmaCheckpoint(folder)
    read, sizes = source.read(source.config(config), shapes), {}
    tracemalloc.start()
    try:
        for path, value in read:
            sizes[path] = value.nbytes
            del value
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest, gate = max(sizes.values()), 2 * 256 * 1024 * 4
    assert largest == sizes["blocks/layers/gate/weight"] == 4 * gate
    # (And what Orbax makes around a tensor.)
    assert largest < peak < largest + 3 * gate < sum(sizes.values()) / 1.5


def test_archives_and_training_folders(tmp_path):
    """A folder inside the archive beside the tokenizer; a step of a Kauldron run; old writers."""
    reference = randomise(gemma1())
    config = architecture.decoder_config(reference.config)
    tree = nested(reference, False)
    weights = written(flat(tree), tmp_path / "archive" / "2b")
    (tmp_path / "archive" / "tokenizer.model").write_bytes(b"")
    manager = orbax.CheckpointManager(tmp_path / "kauldron", item_names=("default",))
    saved = orbax.args.StandardSave(kauldron(tree))
    manager.save(7, args=orbax.args.Composite(default=saved))
    manager.close()
    old = shutil.copytree(weights, tmp_path / "old")
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # Orbax of 2024 has neither
        (old / name).unlink()
    orbax.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "a file each", flat(tree))
    for i, name in enumerate(("archive", "kauldron/7", "old", "a file each")):
        convert.import_weights(run(config), str(tmp_path / f"out{i}"), decoder=str(tmp_path / name))
    written(tree, tmp_path / "archive" / "7b")
    with pytest.raises(WeightsError, match="holds several checkpoints: 2b, 7b; give the path"):
        convert.import_weights(run(config), str(tmp_path / "x"), decoder=str(tmp_path / "archive"))


def test_the_table_has_an_inverse():
    rng = np.random.default_rng(0)
    for build, transposed, _ in MODELS.values():
        config = architecture.decoder_config(build().config)
        abstract = StormModel(run(config).model).abstract()["decoder"]
        ours = nnx.traversals.flatten_mapping(abstract, sep="/")
        table = entries(config, transposed_gate=transposed)
        assert sorted(path for entry in table for path in entry.ours) == sorted(ours)
        for entry in table:
            shape = ours[entry.ours[0]].shape[1 if entry.stacked else 0 :]
            arrays = [rng.normal(size=shape) for _ in entry.ours]
            there = entry.to_google(arrays)
            assert there.shape == entry.google_shape(shape)
            for x, y in zip(arrays, entry.to_ours(there), strict=True):
                np.testing.assert_array_equal(x, y)


def test_mistakes_are_named(tmp_path):
    reference = randomise(gemma2())
    tree, config = nested(reference, False), architecture.decoder_config(reference.config)
    folder = written(tree, tmp_path / "google")

    def attempt(match, error=WeightsError, config=config, folder=folder):
        with pytest.raises(error, match=match):
            convert.import_weights(run(config), str(tmp_path / "out"), decoder=str(folder))
        assert not (tmp_path / "out").exists()

    # Every contradiction, and nothing is written.
    attempt(
        rf"vocab_size: 61 in {folder}, 64 in --config\n.*layers: 5 in .*, 4 in --config\n"
        r".*mlp: 48 in .*, 64 in --config\n.*qk_norm: False in .*, True in --config",
        ConfigError,
        dataclasses.replace(config, vocab_size=64, layers=4, mlp=64, qk_norm=True),
    )
    attempt("qkv_bias: False", ConfigError, dataclasses.replace(config, qkv_bias=True))
    # STACKED shows the period of global layers.
    attempt(
        "global_every: 3 in",
        ConfigError,
        folder=written(stacked(tree, 3), tmp_path / "stacked"),
    )
    # Missing, surplus and misshapen tensors, all at once.
    broken = dict(tree)
    broken["layer_1"] = tree["layer_1"] | {"skip_scale": np.ones(3)}
    broken["layer_1"]["mlp"] = {"gating_einsum": tree["layer_1"]["mlp"]["gating_einsum"]}
    broken["layer_2"] = tree["layer_2"] | {"pre_ffw_norm": {"scale": np.ones(31)}}
    attempt(
        r"missing: layer_1/mlp/linear\n"
        r"  without a place in this model: layer_1/skip_scale\n"
        r"  layer_2/pre_ffw_norm/scale has shape \(31,\), this model needs \(32,\)",
        folder=written(broken, tmp_path / "broken"),
    )
    lacking = {name: x for name, x in tree.items() if name != "layer_0"}
    attempt("lacks layer_0/attn/kv_einsum", folder=written(lacking, tmp_path / "lacking"))
    # Not Gemma's at all; ours.
    attempt("not one of Gemma", folder=written({"a": np.ones(3)}, tmp_path / "other"))
    convert.import_weights(run(config), str(tmp_path / "ours"), decoder=str(folder))
    attempt("need no import, --config.init_from", folder=tmp_path / "ours" / "checkpoints" / "0")
    # Square layers: their order cannot be seen.
    square = dataclasses.replace(config, mlp=32)
    one = jax.tree.map(lambda x: x, tree)
    for i in range(5):
        mlp = one[f"layer_{i}"]["mlp"]
        mlp["gating_einsum"], mlp["linear"] = mlp["gating_einsum"][..., :32], mlp["linear"][:32]
    attempt("mlp=32 equals", ConfigError, square, written(one, tmp_path / "square"))
