"""Measures time and peak host memory of importing a model of full size, and of placing it.

    python benchmarks/import_memory.py                                    # Gemma 2 2B
    python benchmarks/import_memory.py --vit=so400m --decoder=gemma2_9b   # and its SigLIP

Random bfloat16 weights in files as published. `convert import` is run on them, then a second
process loads the checkpoint onto all of its devices, sharded over them, as a training run does
(`--place=float32`) or a server (`--place=bfloat16`). Memory is that of the process beyond what it
has when JAX, its devices and the command are loaded; on a CPU, what is placed is part of it. Linux.
Writes twice the model's size to a temporary folder (TMPDIR), and --out.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from transformers import Gemma2Config, SiglipVisionConfig  # noqa: E402

from configs import align, common  # noqa: E402
from storm_jax.config import ModelConfig, RunConfig, from_mapping  # noqa: E402
from storm_jax.interop.files import WeightsWriter  # noqa: E402
from storm_jax.interop.load import shapes_of  # noqa: E402
from storm_jax.interop.names import Name, decoder_names, vit_names  # noqa: E402
from storm_jax.models.storm import StormModel  # noqa: E402

# Each process says when it is ready and waits for a line before it begins.
READY = """
import dataclasses, json, sys, time
import jax
from storm_jax.config import MeshConfig, RunConfig, from_mapping
if PLATFORM:
    jax.config.update("jax_platforms", PLATFORM)  # as `convert import` does
run = from_mapping(RunConfig, json.loads(RUN))
for device in jax.devices():
    jax.device_put(1.0, device).block_until_ready()
from storm_jax import checkpoint, convert
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.state import abstract_params

def go(phase):
    print(phase, file=sys.stderr, flush=True)
    sys.stdin.readline()

go("ready")
"""
IMPORT = """
convert.import_weights(run, OUT, **GIVEN)
"""
PLACE = """
mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
abstract = abstract_params(StormModel(run.model), mesh, jax.numpy.dtype(DTYPE))
params = checkpoint.load_params(OUT, {part: abstract[part] for part in GIVEN})
jax.block_until_ready(params)
largest = max(jax.tree.leaves(params), key=lambda x: x.nbytes)
print("placed", file=sys.stderr, flush=True)
print(json.dumps({
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "bytes_placed": sum(x.nbytes for x in jax.tree.leaves(params)),
    "bytes_of_largest_shard": max(s.data.nbytes for s in largest.addressable_shards),
}))
"""


def write_part(
    folder: pathlib.Path, config, table: list[Name], shapes: dict, shard_bytes: int
) -> int:
    """A folder as transformers writes it, in bfloat16; returns the bytes of its largest file.

    Args:
        folder: is made.
        config: of transformers.
        table, shapes: of the part.
        shard_bytes: of a file, about.
    """
    folder.mkdir()
    config.save_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 2**16, 2**24, np.uint16) & 0x3FFF
    tensors = {}
    for entry in table:
        shape = shapes[entry.ours]
        for layer in range(shape[0] if entry.stacked else 1):
            hf_shape = entry.hf_shape(shape[1:] if entry.stacked else shape)
            tensors[entry.hf.format(layer=layer)] = hf_shape, np.dtype(ml_dtypes.bfloat16)
    writer = WeightsWriter(folder, tensors, shard_bytes)
    for name, (shape, dtype) in tensors.items():
        writer.write(name, np.resize(noise, shape).view(dtype))
    writer.finish()
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def gemma2(model: ModelConfig) -> Gemma2Config:
    config = model.decoder
    return Gemma2Config(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        query_pre_attn_scalar=round((config.query_scale or config.head_dim**-0.5) ** -2),
        sliding_window=config.window, rms_norm_eps=config.norm_eps,
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
    )  # fmt: skip


def siglip(model: ModelConfig) -> SiglipVisionConfig:
    config = model.vit
    return SiglipVisionConfig(
        hidden_size=config.width, intermediate_size=config.mlp, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, patch_size=config.patch_size,
        image_size=config.image_size, layer_norm_eps=config.norm_eps,
    )  # fmt: skip


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process that are in memory, on Linux; {} when it has ended.

    "VmRSS" now, "VmHWM" at most (since `forget_peak`), "RssAnon", "RssFile", "RssShmem" of these.
    """
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return {}
    found = re.findall(r"(VmHWM|VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB", status)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def forget_peak(pid: int) -> None:
    """The peak of a process counts from now on."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_resident(pid: int) -> int:
    """Bytes that a running process has had in memory at most, on Linux; 0 when it has ended.

    (`getrusage` counts what the process was forked from.)
    """
    return resident(pid).get("VmHWM", 0)


def measured(code: str) -> tuple[dict, str]:
    """Runs code that waits at its phases; memory and seconds after "ready", and what it printed."""
    paths = [*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE.parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    lines: list[tuple[float, str]] = []

    def follow():
        for line in process.stderr:
            sys.stderr.write(line)
            lines.append((time.perf_counter(), line.strip()))

    follower = threading.Thread(target=follow)
    follower.start()
    while not any(line == "ready" for _, line in lines):
        if process.poll() is not None:
            sys.exit("failed before it was ready")
        time.sleep(0.01)
    time.sleep(0.5)
    baseline = resident(process.pid)["VmRSS"]
    forget_peak(process.pid)
    start, peak, parts = time.perf_counter(), 0, {}
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        now = resident(process.pid)
        peak = max(peak, now.get("VmHWM", 0))
        if now.get("VmRSS", 0) > sum(parts.values()):
            parts = {k: v for k, v in now.items() if k.startswith("Rss")}
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    follower.join()
    if process.returncode:
        sys.exit("failed")
    # Which part a line of the command is about, and when it came.
    phases = [(t - start, re.match(r"(vit|decoder|wrote|placed)\b.*", x)) for t, x in lines]
    return {
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "peak_beyond_baseline_bytes": peak - baseline,
        "at_the_highest_sample": parts,
        "seconds": round(seconds, 1),
        "said_after_seconds": {found[0][:60]: round(t, 1) for t, found in phases if found},
    }, process.stdout.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoder", default="gemma2_2b", help="a Gemma 2 of configs.common")
    parser.add_argument("--vit", default="", help="of configs.common; none by default")
    parser.add_argument("--layers", type=int, default=0, help="of the decoder, to be quicker")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="of a file, as published")
    parser.add_argument("--place", default="float32", help="dtype in which it is loaded; '': not")
    parser.add_argument("--out", default=str(HERE / "results" / "import_memory.json"))
    args = parser.parse_args()

    config = align.get_config()
    with config.unlocked():
        config.model.decoder = common.decoder(args.decoder)
        config.model.decoder.layers = args.layers or config.model.decoder.layers
        config.model.vit = common.vit(args.vit or "so400m")
    run_json = config.to_json_best_effort()
    run = from_mapping(RunConfig, json.loads(run_json))
    abstract = StormModel(run.model).abstract()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        start, given = time.perf_counter(), {}
        largest = largest_parameter = total = 0
        parts = {"decoder": (gemma2(run.model), decoder_names(run.model.decoder))}
        if args.vit:
            parts["vit"] = siglip(run.model), vit_names(run.model.vit)
        for part, (hf, table) in parts.items():
            shapes = shapes_of(abstract[part])
            shard_bytes = int(args.shard_gb * 1e9)
            written = write_part(folder / part, hf, table, shapes, shard_bytes)
            largest = max(largest, written)
            sizes = [2 * math.prod(shape) for shape in shapes.values()]
            total, largest_parameter = total + sum(sizes), max(largest_parameter, *sizes)
            given[part] = str(folder / part)
        result: dict = {
            "model": {"vit": args.vit, "decoder": args.decoder, "layers": run.model.decoder.layers},
            "bytes_of_parameters": total,
            "bytes_of_largest_parameter": largest_parameter,
            "bytes_of_largest_file": largest,
            "cores": os.cpu_count(),
            "writing_the_files_seconds": round(time.perf_counter() - start, 1),
        }
        known = run_json, str(folder / "out"), given, args.place
        code = f"RUN, OUT, GIVEN, DTYPE = {known!r}\n"
        result["import"], _ = measured(code + "PLATFORM = 'cpu'\n" + READY + IMPORT)
        beyond = result["import"]["peak_beyond_baseline_bytes"]
        result["import"]["beyond_over_largest_file"] = round(beyond / largest, 2)
        if args.place:
            result["place"], printed = measured(code + "PLATFORM = ''\n" + READY + PLACE)
            result["place"] |= {"dtype": args.place, **json.loads(printed)}
            beyond = result["place"]["peak_beyond_baseline_bytes"]
            result["place"]["beyond_over_largest_file"] = round(beyond / largest, 2)
    print(json.dumps(result, indent=1))
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
