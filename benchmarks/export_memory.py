"""Measures time and peak memory of exporting a model of full size and of reading it back.

Run `python benchmarks/export_memory.py [SIZE] [SHARD_SIZE]`, a size of `configs.common` (gemma3_4b)
and the size of the files (5GB). Random bfloat16 weights; writes three times the model's size to a
temporary folder, and benchmarks/results/export_memory.json. Needs PyTorch for the last part.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

from import_memory import peak_resident  # noqa: E402

# Each part is a process of its own, with FOLDER and SIZE in front.
MAKE = """
import dataclasses, json, jax, ml_dtypes, numpy as np
from flax import nnx
from configs import align
from storm_jax import checkpoint
from storm_jax.config import RunConfig, from_mapping
from storm_jax.models.storm import StormModel
config = from_mapping(RunConfig, json.loads(align.get_config(f"size={SIZE}").to_json_best_effort()))
config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bytes"))
noise = np.random.default_rng(0).normal(0, 0.02, 2**24).astype(ml_dtypes.bfloat16)
flat = nnx.traversals.flatten_mapping(StormModel(config.model).abstract())
params = {
    # (Orbax copies all NumPy arrays before it writes the first.)
    path: jax.device_put(np.resize(np.roll(noise, i), x.shape))
    for i, (path, x) in enumerate(flat.items())
}
checkpoint.save_params(FOLDER + "/ckpt", nnx.traversals.unflatten_mapping(params), config)
"""
COMPARE = """
import numpy as np
from storm_jax import checkpoint
names = list(checkpoint.describe(FOLDER + "/ckpt")[1])
back = list(checkpoint.describe(FOLDER + "/back")[1])
assert names == back
total = 0
both = (checkpoint.parameters(f"{FOLDER}/{which}", names) for which in ("ckpt", "back"))
for name, ours, theirs in zip(names, *both, strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
    assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16)), name
    total += ours.nbytes
print(total)
"""
TORCH = """
import time, torch, transformers
transformers.utils.logging.disable_progress_bar()
start = time.perf_counter()
model, info = transformers.AutoModelForImageTextToText.from_pretrained(
    FOLDER + "/hf", trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
loaded = time.perf_counter() - start
config = model.config
ids = [7] * 8 + [config.video_token_id] * config.visual_tokens(4) + [9] * 8
frames = torch.rand(4, 3, config.image_size, config.image_size) * 2 - 1
start = time.perf_counter()
with torch.no_grad():
    logits = model(
        input_ids=torch.tensor([ids]), pixel_values_videos=frames,
        frame_counts=torch.tensor([4]), logits_to_keep=1,
    ).logits
assert logits.isfinite().all()
print(loaded, time.perf_counter() - start)
"""


def measured(folder: str, size: str, *command: str, code: str = "") -> tuple[float, int, str]:
    """Runs `python -m storm_jax.convert COMMAND`, or code; seconds, peak bytes, what it printed."""
    if code:
        code = f"FOLDER, SIZE = {folder!r}, {size!r}\n" + code
        arguments = [sys.executable, "-c", code]
    else:
        arguments = [sys.executable, "-m", "storm_jax.convert", *command]
    paths = [*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        arguments, cwd=HERE.parent, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    while process.poll() is None:
        peak = max(peak, peak_resident(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"failed: {command or code}")
    assert process.stdout is not None
    return round(seconds, 1), peak, process.stdout.read()


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "gemma3_4b"
    shard = sys.argv[2] if len(sys.argv) > 2 else "5GB"
    with tempfile.TemporaryDirectory() as folder:  # TMPDIR says where
        measured(folder, size, code=MAKE)
        export = measured(
            folder, size, "export", f"--checkpoint={folder}/ckpt", f"--out={folder}/hf",
            f"--max-shard-size={shard}",
        )  # fmt: skip
        files = sorted(pathlib.Path(folder, "hf").glob("*.safetensors"))
        back = measured(folder, size, "import", f"--storm={folder}/hf", f"--out={folder}/back")
        parameters = int(measured(folder, size, code=COMPARE)[2])
        torch = measured(folder, size, code=TORCH)
    loaded, forward = map(float, torch[2].split())
    result = {
        "size": size,
        "bytes_of_parameters": parameters,
        "files": len(files),
        "export_seconds": export[0],
        "export_peak_resident_bytes": export[1],
        "import_seconds": back[0],
        "import_peak_resident_bytes": back[1],
        "bit_identical_after_export_and_import": True,  # else the comparison has failed
        "torch_load_seconds": round(loaded, 1),
        "torch_forward_seconds": round(forward, 1),
        "torch_peak_resident_bytes": torch[1],
    }
    print(json.dumps(result, indent=1))
    path = HERE / "results" / "export_memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
