"""`python -m storm_jax.convert` in processes of its own."""

import re

import pytest

from configs import debug
from storm_jax import checkpoint
from tests.commands.conftest import Command, training

pytest.importorskip("torch")
import transformers  # noqa: E402


def saved_vit(folder):
    """The ViT of configs/debug.py with random weights, saved by transformers; its configuration."""
    vit = debug.get_config().model.vit
    config = transformers.SiglipVisionConfig(
        image_size=vit.image_size, patch_size=vit.patch_size, hidden_size=vit.width,
        intermediate_size=vit.mlp, num_hidden_layers=vit.layers, num_attention_heads=vit.heads,
    )  # fmt: skip
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return vit


def test_import_and_inspect(tmp_path):
    vit = saved_vit(tmp_path / "hf")
    given = ("import", "--config=configs/debug.py", f"--out={tmp_path / 'out'}")
    code, _, err = Command("convert", *given, f"--vit={tmp_path / 'hf'}").finish()
    assert code == 0, err
    code, out, err = Command("convert", "inspect", str(tmp_path / "out")).finish()
    assert code == 0, err
    assert re.search(rf"vit/patch/weight +float32 +[\d,]+ {8 * 8 * 3}x{vit.width}\n", out)
    code, out, err = Command("convert", "inspect", str(tmp_path)).finish()
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: no checkpoint at")
    given = ("import", f"--storm={tmp_path / 'hf'}", "--out=gs://bucket/out")
    code, _, err = Command("convert", *given).finish()
    assert code == 1 and "error: --out=gs://bucket/out is not on a disk: give a folder" in err


RECIPE = """
from configs import align, debug

def get_config():
    config = align.get_config("cluster=v5e_256")
    with config.unlocked():
        config.model = debug.get_config().model
    return config
"""


def test_the_mesh_of_a_recipe_is_not_that_of_this_machine(tmp_path):
    """A shipped recipe for 256 chips, here with a model that is small; then it itself."""
    vit = saved_vit(tmp_path / "hf")
    (tmp_path / "recipe.py").write_text(RECIPE)
    out = tmp_path / "out"
    given = ("import", f"--vit={tmp_path / 'hf'}", f"--out={out}")
    code, _, err = Command("convert", *given, "--config=configs/align.py:cluster=v5e_256").finish()
    assert code == 1 and f"width: {vit.width} in config.json, 1152 in --config" in err
    assert not out.exists()
    code, _, err = Command("convert", *given, f"--config={tmp_path / 'recipe.py'}").finish()
    assert code == 0, err
    assert "this machine's CPU reads and writes" in err
    mesh = checkpoint.read_config(out).mesh
    assert mesh.data * mesh.fsdp * mesh.seq == 256  # goes along for the training


@pytest.mark.slow
def test_a_run_starts_from_what_was_imported(videos, tmp_path):
    """`init_from`: the parts that an import has, one by one; a part that it lacks is named."""
    config = debug.get_config().model
    vit, decoder = config.vit, config.decoder
    tower = transformers.SiglipVisionConfig(
        image_size=vit.image_size, patch_size=vit.patch_size, hidden_size=vit.width,
        intermediate_size=vit.mlp, num_hidden_layers=vit.layers, num_attention_heads=vit.heads,
    )  # fmt: skip
    transformers.SiglipVisionModel(tower).save_pretrained(tmp_path / "vit")
    text = transformers.Gemma3TextConfig(
        vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp,
        num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads, head_dim=decoder.head_dim,
        query_pre_attn_scalar=decoder.head_dim, sliding_window=decoder.window,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(text).save_pretrained(tmp_path / "decoder")
    imported = tmp_path / "imported"
    parts = (f"--vit={tmp_path / 'vit'}", f"--decoder={tmp_path / 'decoder'}")
    given = ("import", "--config=configs/debug.py", f"--out={imported}", *parts)
    code, _, err = Command("convert", *given).finish()
    assert code == 0, err

    def train(name, *overrides):
        short = ("--config.train.steps=1", "--config.train.eval_samples=0")
        return training(videos, tmp_path / name, *short, *overrides).finish()

    def starts(err):
        return sorted(line.split()[0] for line in err.splitlines() if " starts from " in line)

    for part in ("", "temporal", "projector"):
        field = ".".join(filter(None, ("--config.init_from", part)))
        code, _, err = train(f"no {part}", f"{field}={imported}")
        assert code != 0
        lacking = part or "projector"
        assert f"has no part {lacking}, only decoder, vit; in place of" in err
    both = (f"--config.init_from.vit={imported}", f"--config.init_from.decoder={imported}")
    code, _, err = train("first", *both)
    assert code == 0, err
    assert starts(err) == ["decoder", "vit"]
    code, _, err = train("next", "--config.init_from", str(tmp_path / "first"), both[0])
    assert code == 0, err
    assert starts(err) == ["decoder", "projector", "temporal", "vit"]
    assert f"vit starts from {imported}" in err
    assert f"temporal starts from {tmp_path / 'first'}" in err
