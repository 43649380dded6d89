"""Measures time and peak memory of importing a decoder of full size, with random weights.

Run `python benchmarks/import_memory.py [DECODER] [SHARD_GB]`, a name of `configs.common.decoder`
(gemma2_2b) and the size of the safetensors files (5, as published). Writes twice the model's size
to a temporary folder, and benchmarks/results/import_memory.json.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from transformers import Gemma2Config  # noqa: E402

from configs import common  # noqa: E402
from storm_jax.config import DecoderConfig, from_mapping  # noqa: E402
from storm_jax.interop.names import decoder_names  # noqa: E402
from storm_jax.models.decoder import Decoder  # noqa: E402

CONFIG = """
from configs import align, common

def get_config():
    config = align.get_config()
    with config.unlocked():
        config.model.decoder = common.decoder("{name}")
    return config
"""


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a decoder, by its path."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state), sep="/")
    return {path: x.shape for path, x in flat.items()}


def write_model(name: str, folder: pathlib.Path, shard_bytes: int) -> int:
    """A Gemma 2 folder as transformers writes it, bfloat16; returns the bytes of its largest file.

    Args:
        name: of `configs.common.decoder`, a Gemma 2.
        folder: is made.
        shard_bytes: of a file, about.
    """
    config = from_mapping(DecoderConfig, common.decoder(name).to_dict())
    folder.mkdir()
    Gemma2Config(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        query_pre_attn_scalar=round((config.query_scale or config.head_dim**-0.5) ** -2),
        sliding_window=config.window, rms_norm_eps=config.norm_eps,
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
    ).save_pretrained(folder)  # fmt: skip
    of = shapes(config)
    noise = np.random.default_rng(0).integers(0, 2**16, 2**24, np.uint16) & 0x3FFF
    shard, size, index, largest = {}, 0, {}, 0

    def flush():
        nonlocal shard, size, largest
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        largest = max(largest, (folder / file).stat().st_size)
        shard, size = {}, 0

    for entry in decoder_names(config):
        shape = of[entry.ours]
        for layer in range(shape[0] if entry.stacked else 1):
            hf_shape = entry.hf_shape(shape[1:] if entry.stacked else shape)
            tensor = np.resize(noise, hf_shape).view(ml_dtypes.bfloat16)
            shard[entry.hf.format(layer=layer)] = tensor
            size += tensor.nbytes
            if size >= shard_bytes:
                flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return largest


def peak_resident(pid: int) -> int:
    """Bytes that a running process has had in memory at most, on Linux; 0 when it has ended.

    (`getrusage` counts what the process was forked from.)
    """
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "gemma2_2b"
    shard_bytes = int(float(sys.argv[2] if len(sys.argv) > 2 else 5) * 1e9)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        largest = write_model(name, folder / "hf", shard_bytes)
        (folder / "config.py").write_text(CONFIG.format(name=name))
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "storm_jax.convert", "import", f"--decoder={folder / 'hf'}",
                f"--config={folder / 'config.py'}", f"--out={folder / 'out'}",
            ],
            cwd=HERE.parent, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])},
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_resident(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit("the import failed")
    config = from_mapping(DecoderConfig, common.decoder(name).to_dict())
    total = sum(2 * math.prod(shape) for shape in shapes(config).values())
    result = {
        "decoder": name,
        "bytes_of_parameters": total,
        "bytes_of_largest_file": largest,
        "peak_resident_bytes": peak,
        "beyond_parameters_over_largest_file": round((peak - total) / largest, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result, indent=1))
    path = HERE / "results" / "import_memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
