"""Model FLOPs: two per matrix weight and token, counted from the model's own parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import long
from storm_jax.config import RunConfig, from_mapping
from storm_jax.flops import Work, forward_flops, peak_flops, training_flops
from storm_jax.models.storm import StormModel
from tests.tiny import packed_batch


@pytest.fixture(scope="module", params=("qwen2_7b", "gemma3_1b", "tiny"))
def model(request):
    raw = long.get_config(f"size={request.param}").to_json_best_effort()
    return from_mapping(RunConfig, json.loads(raw)).model


def matrices(tree, *skip: str) -> int:
    """Elements of all arrays that are multiplied with activations."""
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path[-1].key
        if name in ("weight", "conv_weight", "table") and path[0].key not in skip:
            total += x.size
    return total


def test_forward_counts_every_matrix(model):
    params = StormModel(model).abstract()
    flops = forward_flops(model, Work(frames=1, tokens=1, scored=1, attended=1, frame_pairs=1))
    decoder = model.decoder
    head = decoder.vocab_size * decoder.width
    used = matrices(params["decoder"], "embedding", "head") + head
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim
    assert flops["decoder"] == 2 * used + attention

    patches = model.vit.grid**2
    attention = 4 * model.vit.layers * patches**2 * model.vit.width
    assert flops["vit"] == 2 * patches * matrices(params["vit"]) + attention
    assert flops["projector"] == 2 * model.frame_tokens * matrices(params["projector"])
    assert flops["temporal"] == 2 * model.frame_tokens * matrices(params["temporal"])


def test_frozen_parts_cost_less(model):
    work = Work(frames=8, tokens=100, scored=20, attended=5000, frame_pairs=64)
    forward = forward_flops(model, work)
    everything = training_flops(model, work, ("vit", "projector", "temporal", "decoder"))
    assert everything == pytest.approx(3 * sum(forward.values()))
    # Stage 1: no gradient reaches the ViT, but it passes through the frozen decoder.
    align = training_flops(model, work, ("projector", "temporal"))
    expected = forward["vit"] + 3 * (forward["projector"] + forward["temporal"])
    assert align == pytest.approx(expected + 2 * forward["decoder"])


def test_work_leaves_padding_out(model):
    small = dataclasses.replace(model, vit=dataclasses.replace(model.vit, image_size=28))
    if small.vit.grid < small.projector.shuffle or small.group_tokens > 4:
        pytest.skip("one frame would not fit this row")
    batch = packed_batch(small, rows=2, length=12, frames=3, seed=0)
    batch["segments"][1, 5:] = -1
    batch["frame_segments"][1, 1:] = -1
    work = Work.of(batch)
    # Query i sees i + 1 keys: 12 * 13 / 2 in the first row, 5 * 6 / 2 in the second.
    # A third of a row has targets, and one token of it stands at the row's end.
    assert work == Work(frames=4, tokens=17, scored=2 * 4, attended=78 + 15, frame_pairs=9 + 1)


def test_full_rows():
    raw = long.get_config("size=tiny").to_json_best_effort()
    run = from_mapping(RunConfig, json.loads(raw))
    data = run.data
    work = Work.full(data, run.model, 3)
    S, visual = data.sequence_length, run.model.visual_tokens(data.row_frames)
    # The same as a batch of rows with one sample and no padding.
    batch = {
        "segments": np.zeros((3, S), np.int32),
        "frame_segments": np.zeros((3, data.row_frames), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (3, 1)),
        "targets": np.tile(np.where(np.arange(S) < visual, -1, 1), (3, 1)),
    }
    assert work == Work.of(batch)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None
    assert np.isfinite(peak_flops("TPU v6 lite"))
