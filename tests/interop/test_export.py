"""Exported models, loaded where storm_jax is not installed: the same numbers as here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from storm_jax import checkpoint, convert
from storm_jax.config import VISUAL
from storm_jax.interop.files import Weights
from storm_jax.interop.names import storm_names
from storm_jax.models.storm import StormModel
from storm_jax.training.loss import loss_sums
from tests.interop import exported
from tests.interop.exported import DECODERS, REDUCTIONS, Row, model_of

pytest.importorskip("torch")

# Every family and every kind of reduction at least once; all pairs are slow.
TOGETHER = {
    "gemma": "spatial",
    "gemma2": "temporal+sampling",
    "gemma3": "temporal",
    "qwen2": "none",
    "qwen2_tied": "all",
    "qwen2_local": "sampling",
}
LARGE = dict(image_size=36, position_grid=12)  # 36 tokens a frame
OTHERS = {
    "vit -2, its table resized, no norm in the projector, an odd grid": dict(
        vit=dict(exported.VIT, image_size=16, output_layer=-2, layers=3, frames_per_call=2),
        projector=dict(norm=False, shuffle=2),
    ),
    "forward alone, 3 taps, rank 5": dict(
        temporal=dict(direction="forward", layers=1, conv=3, dt_rank=5, expand=3)
    ),
    "no Mamba layers": dict(temporal=dict(layers=0)),
    "more tokens than a chunk of the scan": dict(vit=LARGE),
}
NEW = 64

RUN = """
folders, few = {folders}, dict(max_new_tokens=12)
for number, folder in enumerate(folders):
    model = load(folder)
    out = {{}}
    for side in ("left", "right"):
        batch = arrays(f"{{number}}_{{side}}.npz")
        with torch.no_grad():
            out[side] = model(**batch).logits.numpy()
    batch = arrays(f"{{number}}_left.npz")
    options = dict(max_new_tokens={new}, do_sample=False, eos_token_id=None)
    out["cached"] = model.generate(**batch, **options).numpy()
    out["uncached"] = model.generate(**batch, use_cache=False, **options | few).numpy()
    batch = {{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}}
    with torch.no_grad(), Float64():
        out["double"] = model.double()(**batch).logits.numpy()
    np.savez(f"{{number}}_out.npz", **out)
"""


def run(cases, tmp_path):
    """Of each model: what it is here, its rows, and what PyTorch computed of them."""
    found = []
    for number, model in enumerate(cases):
        there = exported.export(model, tmp_path / str(number), seed=exported.STEADY)
        rows = exported.rows(model)
        token = exported.settings(there.folder)["video_token_id"]
        for side in ("left", "right"):
            batch = exported.inputs(rows, token, left=side == "left")
            np.savez(tmp_path / f"{number}_{side}.npz", **batch)
        found.append((there, rows))
    folders = [str(there.folder) for there, _ in found]
    exported.in_twin(tmp_path, RUN.format(folders=folders, new=NEW), timeout=900)
    for number, (there, rows) in enumerate(found):
        yield there, rows, np.load(tmp_path / f"{number}_out.npz")


def compare(cases, tmp_path):
    """Logits with padding on either side, and greedy tokens with and without a cache."""
    for there, rows, out in run(cases, tmp_path):
        longest = max(len(row.tokens) for row in rows)
        np.testing.assert_array_equal(out["cached"][:, : longest + 12], out["uncached"])
        answers = out["cached"][:, longest:].tolist()
        assert len(set(sum(answers, []))) > 12, answers  # they do say something
        # One pass over prompt and answer: the scores of the prompt, and after each token of the
        # answer the next one must be our first choice.
        whole = [Row(r.videos, r.tokens + a) for r, a in zip(rows, answers, strict=True)]
        ours = exported.logits(there, whole)
        for b, row in enumerate(rows):
            n = len(row.tokens)
            left, right = out["left"][b, longest - n :], out["right"][b, :n]
            np.testing.assert_allclose(left, ours[b][:n], atol=2e-5, rtol=0)
            np.testing.assert_allclose(right, ours[b][:n], atol=2e-5, rtol=0)
            assert ours[b][n - 1 : -1].argmax(-1).tolist() == answers[b], b


def test_every_family_and_every_reduction(tmp_path):
    cases = [model_of(family, reduction) for family, reduction in TOGETHER.items()]
    compare(cases, tmp_path)


def test_other_vits_projectors_and_mamba_layers(tmp_path):
    compare([model_of("gemma3", "temporal", **parts) for parts in OTHERS.values()], tmp_path)


@pytest.mark.slow
def test_decoders_between_the_published_ones(tmp_path):
    def changed(family, **changes):
        model = model_of(family, "temporal")
        decoder = dataclasses.replace(model.decoder, **changes)
        return dataclasses.replace(model, decoder=decoder)

    cases = [
        changed("gemma", rope_scaling=4.0),
        changed("qwen2", rope_scaling=4.0),
        changed("gemma2", rope_scaling=4.0, global_every=1, window=0, attention_softcap=0.0),
        changed("gemma3", global_every=1, window=0, rope_scaling=1.0, tied_embeddings=False),
        changed("gemma3", global_every=9, logit_softcap=3.0),  # no global layer at all
        changed("gemma3", activation="silu", kv_heads=4),
        changed("qwen2", activation="gelu_tanh"),
    ]
    compare(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, pytest.param(6, marks=pytest.mark.exhaustive)])
def test_drawn_models(first, tmp_path):
    """Both sides are within the tolerance of what PyTorch computes in float64."""
    cases = [exported.drawn(seed) for seed in range(first, first + 6)]
    for there, rows, out in run(cases, tmp_path):
        longest = max(len(row.tokens) for row in rows)
        for b, ours in enumerate(exported.logits(there, rows)):
            left, double = (out[k][b, longest - len(ours) :] for k in ("left", "double"))
            assert double.dtype == np.float64
            for found in (ours, left, out["right"][b, : len(ours)]):
                np.testing.assert_allclose(found, double, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [f if f == "gemma3" else pytest.param(f, marks=pytest.mark.exhaustive) for f in DECODERS],
)
def test_all_pairs(family, tmp_path):
    compare([model_of(family, reduction) for reduction in REDUCTIONS], tmp_path)


TRAIN = """
torch.manual_seed(0)
model = load("hf", "AutoModelForCausalLM")
batch, labels = arrays("batch.npz"), torch.from_numpy(np.load("labels.npy"))
grads = {}
for name in ("plain", "checkpointed"):
    model.zero_grad()
    if name == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable()
    out = model(**batch, labels=labels)
    out.loss.backward()
    grads[name] = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    np.savez(name, loss=out.loss.detach().numpy(), **grads[name])
layers = {type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", 0)}
assert {"MambaLayer", "SiglipEncoderLayer", "Gemma3DecoderLayer"} <= layers
# Some steps of training lower the loss, and what transformers saves then comes back.
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
losses = []
for _ in range(4):
    optimizer.zero_grad()
    out = model(**batch, labels=labels)
    out.loss.backward()
    optimizer.step()
    losses.append(out.loss.item())
assert losses[-1] < 0.9 * losses[0], losses
model.save_pretrained("trained", max_shard_size="30KB")
np.savez("trained", **{n: p.detach().numpy() for n, p in model.named_parameters()})
again = load("trained").train()
assert torch.equal(again(**batch, labels=labels).loss, model(**batch, labels=labels).loss)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model whose loss and gradients PyTorch computed, and that it trained a little."""
    folder = tmp_path_factory.mktemp("trained")
    model = model_of("gemma3", "temporal+sampling", vit=LARGE)
    there = exported.export(model, folder)
    rows = exported.rows(model)
    batch = exported.inputs(rows, exported.settings(there.folder)["video_token_id"], left=False)
    labels = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[0, -4:] = -100  # visual tokens are among the rest: the model leaves them out itself
    np.savez(folder / "batch.npz", **batch)
    np.save(folder / "labels.npy", labels)
    exported.in_twin(folder, TRAIN)
    return there, rows, labels


def hf_tensors(tree, model):
    """A tree like the parameters, as the tensors of an export."""
    flat = nnx.traversals.flatten_mapping(tree, sep="/")
    out = {}
    for name in storm_names(model):
        value = np.asarray(flat[name.ours])
        for layer, tensor in enumerate(value if name.stacked else [value]):
            out[name.hf.format(layer=layer)] = name.to_hf(tensor)
    return out


def test_loss_and_every_gradient(trained):
    there, rows, labels = trained
    config = there.run.model
    model = StormModel(config)
    batch = exported.packed(config, rows, labels.shape[1])
    targets = np.full_like(batch["tokens"], -1)
    follows = np.where(batch["tokens"] == VISUAL, -100, labels)[:, 1:]
    targets[:, :-1] = np.where(follows == -100, -1, follows)

    def loss(params):
        storm = model.bind(params)
        sums = loss_sums(storm.decoder, storm(batch), jnp.asarray(targets))
        return sums.nll / sums.tokens

    value, grads = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.asarray, there.params))
    expected = hf_tensors(grads, config)
    for name in ("plain", "checkpointed"):
        found = dict(np.load(there.folder.parent / f"{name}.npz"))
        np.testing.assert_allclose(found.pop("loss"), value, rtol=1e-6)
        assert set(found) == set(expected)
        for tensor, gradient in found.items():
            size = np.abs(expected[tensor]).max()
            # A bias of all keys alike changes no softmax: its gradient is zero but for rounding.
            zero = tensor.startswith("vision") and tensor.endswith("k_proj.bias")
            assert (size < 1e-6) if zero else (size > 1e-5), (tensor, size)
            atol = 1e-6 if zero else 2e-5 * size
            np.testing.assert_allclose(
                gradient, expected[tensor], atol=atol, rtol=0, err_msg=tensor
            )


def test_what_pytorch_trained_comes_back(trained, tmp_path):
    there, _, _ = trained
    folder = there.folder.parent
    convert.import_export(folder / "trained", str(tmp_path / "back"))
    params = stored(tmp_path / "back")
    expected = dict(np.load(folder / "trained.npz"))
    found = hf_tensors(params, there.run.model)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, name)


def stored(path):
    """All parameters of a checkpoint as a nested dict of arrays on the host."""
    names = list(checkpoint.describe(path)[1])
    found = dict(zip(names, checkpoint.parameters(path, names), strict=True))
    return nnx.traversals.unflatten_mapping(found, sep="/")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_and_import_are_exact(dtype, tmp_path):
    model = model_of("qwen2", "all", vit=dict(exported.VIT, position_grid=5))
    there = exported.export(model, tmp_path, dtype=dtype)
    weights = Weights(there.folder)
    wanted = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype or "float32")), there.params)
    expected = hf_tensors(wanted, model)
    assert set(weights.names) == set(expected)
    for name, tensor in expected.items():
        found = weights.tensor(name)
        assert found.dtype == tensor.dtype
        np.testing.assert_array_equal(found, tensor, name)
    assert exported.settings(there.folder)["dtype"] == (dtype or "float32")
    # The way back, and the run with it.
    convert.import_export(there.folder, str(tmp_path / "back"))
    run = checkpoint.read_config(tmp_path / "back")
    assert run.model == model
    assert run.data.train == () and run.data.frames == there.run.data.frames
    flat = nnx.traversals.flatten_mapping(wanted)
    back = nnx.traversals.flatten_mapping(stored(tmp_path / "back"))
    assert set(back) == set(flat)
    for path, value in flat.items():
        assert back[path].dtype == value.dtype
        np.testing.assert_array_equal(back[path], value, str(path))


HALF = """
import types
calls = []

def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    # What selective_scan.cpp of mamba_ssm checks, then what its selective_scan_ref computes.
    calls.append(u.shape)
    assert delta.dtype == B.dtype == C.dtype == u.dtype == torch.bfloat16
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert all(x.stride(-1) == 1 for x in (u, delta, A, B, C, D, delta_bias))
    (batch, dim, length), state = u.shape, A.shape[1]
    assert delta.shape == u.shape and A.shape == (dim, state)
    assert D.shape == delta_bias.shape == (dim,)
    assert B.shape == C.shape == (batch, state, length)
    assert delta_softplus and z is None
    delta = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
    h, ys = torch.zeros(batch, dim, state), []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h
        h = h + (delta * u.float())[:, :, t, None] * B[:, None, :, t].float()
        ys.append((h * C[:, None, :, t].float()).sum(-1))
    return (torch.stack(ys, -1) + u.float() * D[:, None]).to(u.dtype)

name = "mamba_ssm.ops.selective_scan_interface"
sys.modules[name] = types.SimpleNamespace(selective_scan_fn=kernel)
for parent in ("mamba_ssm", "mamba_ssm.ops"):
    sys.modules[parent] = types.ModuleType(parent)
model = load("hf")
assert model.dtype == torch.bfloat16 == next(model.parameters()).dtype
with torch.no_grad():
    np.save("half.npy", model(**arrays("batch.npz")).logits.float().numpy())
    assert not calls
    # As on a GPU: the two directions of every layer go through the kernel.
    x = torch.randn(2, 300, 32).bfloat16()
    plain = model.temporal(x)
    torch.Tensor.is_cuda = property(lambda self: True)
    fast = model.temporal(x)
assert len(calls) == 4, calls
difference = (plain.float() - fast.float()).abs()
assert difference.max() <= 2**-7 * plain.abs().max(), difference.max()
assert difference.mean() < 2**-10 * plain.float().abs().mean(), difference.mean()
"""


def test_bfloat16_is_as_good_there_as_here(tmp_path):
    model = model_of("gemma2", "temporal")
    there = exported.export(model, tmp_path, dtype="bfloat16")
    rows = exported.rows(model)
    batch = exported.inputs(rows, exported.settings(there.folder)["video_token_id"], left=False)
    np.savez(tmp_path / "batch.npz", **batch)
    exported.in_twin(tmp_path, HALF)
    theirs = np.load(tmp_path / "half.npy")
    rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), there.params)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), rounded)
    exact = exported.logits(dataclasses.replace(there, params=wide), rows)
    half_run = dataclasses.replace(there.run, model=dataclasses.replace(model, dtype="bfloat16"))
    half = exported.logits(dataclasses.replace(there, run=half_run, params=rounded), rows)

    def error(logits):
        return np.mean([np.abs(x[: len(e)] - e).mean() for x, e in zip(logits, exact, strict=True)])

    assert 0 < error(theirs) < 1.5 * error(half)


GENERATE = """
folder = "hf"
batch = arrays("batch.npz")
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "StormConfig"
logits = {}
for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText",
             "AutoModelForMultimodalLM"):
    for attention in ("sdpa", "eager"):
        model = load(folder, auto, attn_implementation=attention)
        assert model.vision_tower.config._attn_implementation == attention
        with torch.no_grad():
            # (What stands at padding is nobody's.)
            logits[auto, attention] = model(**batch).logits * batch["attention_mask"][..., None]
first = logits["AutoModel", "sdpa"]
for other in logits.values():
    assert (other - first).abs().max() < 2e-5
assert model.generation_config.eos_token_id == [260, 258]
# Rows are repeated together with their videos.
greedy = dict(max_new_tokens=5, do_sample=False)
alone = model.generate(**batch, **greedy)
with torch.no_grad():
    torch.manual_seed(0)
    twice = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=1)
ids, inputs = model._expand_inputs_for_generation(expand_size=2, **batch)
with torch.no_grad():
    both = model(input_ids=ids, **inputs).logits * inputs["attention_mask"][..., None]
assert (both - first.repeat_interleave(2, 0)).abs().max() < 2e-5
beams = model.generate(**batch, num_beams=3, max_new_tokens=5)
assert len(beams) == len(alone) and len(twice) == 2 * len(alone)
assert (model.generate(**batch, **greedy, cache_implementation="static") == alone).all()
# Whole frames of another size, frames without tokens and tokens without frames are named.
def refused(match, **changes):
    try:
        model(**{**batch, **changes})
    except ValueError as error:
        assert match in str(error), error
    else:
        raise AssertionError(match)
refused("sum to 9, but", frame_counts=torch.tensor([4, 3, 1, 1]))
refused("not [3, 14, 14]", pixel_values_videos=batch["pixel_values_videos"][:, :, 1:])
refused("visual tokens, but videos of", frame_counts=torch.tensor([10]))
refused("but there are no frames", pixel_values_videos=None, frame_counts=None)
refused("belong together", frame_counts=None)
refused("one of input_ids", input_ids=None)
# A test-time choice is a field of the configuration.
every = load(folder, temporal_sampling=3)
assert every.config.visual_tokens(5) < model.config.visual_tokens(5)
# Fresh weights: what Mamba starts from.
fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
layer = fresh.temporal.layers[1].backward_direction
assert torch.equal(layer.A_log[3].exp().round(), torch.arange(1.0, 5.0)), layer.A_log
step = torch.nn.functional.softplus(layer.dt_proj.bias)
assert 0.9e-3 < step.min() and step.max() < 0.11 and step.std() > 0.01
assert all(p.isfinite().all() and p.abs().max() < 50 for p in fresh.parameters())
"""


def test_generation_attention_and_mistakes(tmp_path):
    model = model_of("gemma3", "temporal")
    there = exported.export(model, tmp_path)
    rows = exported.rows(model)
    batch = exported.inputs(rows, exported.settings(there.folder)["video_token_id"], left=True)
    np.savez(tmp_path / "batch.npz", **batch)
    exported.in_twin(tmp_path, GENERATE)
