"""`python -m storm_jax.convert` in processes of its own."""

import re

import pytest

from configs import debug
from tests.commands.conftest import Command

pytest.importorskip("torch")
import transformers  # noqa: E402


def test_import_and_inspect(tmp_path):
    vit = debug.get_config().model.vit
    config = transformers.SiglipVisionConfig(
        image_size=vit.image_size, patch_size=vit.patch_size, hidden_size=vit.width,
        intermediate_size=vit.mlp, num_hidden_layers=vit.layers, num_attention_heads=vit.heads,
    )  # fmt: skip
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "hf")
    given = ("import", "--config=configs/debug.py", f"--out={tmp_path / 'out'}")
    code, _, err = Command("convert", *given, f"--vit={tmp_path / 'hf'}").finish()
    assert code == 0, err
    code, out, err = Command("convert", "inspect", str(tmp_path / "out")).finish()
    assert code == 0, err
    assert re.search(rf"vit/patch/weight +float32 +[\d,]+ {8 * 8 * 3}x{vit.width}\n", out)
    code, out, err = Command("convert", "inspect", str(tmp_path)).finish()
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: no checkpoint at")
