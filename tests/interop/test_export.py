"""Exported models, loaded where storm_jax is not installed: the same numbers as here."""

import numpy as np
import pytest

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
OTHERS = {
    "vit -2, its table resized, no norm in the projector, an odd grid": dict(
        vit=dict(exported.VIT, image_size=16, output_layer=-2, layers=3, frames_per_call=2),
        projector=dict(norm=False, shuffle=2),
    ),
    "forward alone, 3 taps, rank 5": dict(
        temporal=dict(direction="forward", layers=1, conv=3, dt_rank=5, expand=3)
    ),
    "no Mamba layers": dict(temporal=dict(layers=0)),
}
NEW = 64

RUN = """
folders = {folders}
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
    out["uncached"] = model.generate(**batch, use_cache=False, **options).numpy()
    np.savez(f"{{number}}_out.npz", **out)
"""


def compare(cases, tmp_path):
    """Logits with padding on either side, and greedy tokens with and without a cache."""
    models, all_rows = [], []
    for number, model in enumerate(cases):
        there = exported.export(model, tmp_path / str(number))
        rows = exported.rows(model)
        token = exported.settings(there.folder)["video_token_id"]
        for side in ("left", "right"):
            batch = exported.inputs(rows, token, left=side == "left")
            np.savez(tmp_path / f"{number}_{side}.npz", **batch)
        models.append(there)
        all_rows.append(rows)
    folders = [str(there.folder) for there in models]
    exported.in_twin(tmp_path, RUN.format(folders=folders, new=NEW), timeout=900)
    for number, (there, rows) in enumerate(zip(models, all_rows, strict=True)):
        out = np.load(tmp_path / f"{number}_out.npz")
        longest = max(len(row.tokens) for row in rows)
        np.testing.assert_array_equal(out["cached"], out["uncached"])
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
            assert ours[b][n - 1 : -1].argmax(-1).tolist() == answers[b], (number, b)


def test_every_family_and_every_reduction(tmp_path):
    cases = [model_of(family, reduction) for family, reduction in TOGETHER.items()]
    compare(cases, tmp_path)


def test_other_vits_projectors_and_mamba_layers(tmp_path):
    compare([model_of("gemma3", "temporal", **parts) for parts in OTHERS.values()], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_all_pairs(family, tmp_path):
    compare([model_of(family, reduction) for reduction in REDUCTIONS], tmp_path)
