"""Where recipes run: `--config=configs/long.py:cluster=NAME` sets the mesh and what is kept.

Any of it can be set on the command line instead; docs/parallelism.md says how to choose, and
`python -m storm_jax.compile` whether it fits.
"""

from ml_collections import ConfigDict

CLUSTERS = {
    # devices, GiB of memory of each, devices over which parameters are split: those of one NVLink
    # host; on TPUs 128, since the ViT's width, 1152, is 128 x 9
    "v5e_256": (256, 16, 128),  # v5e:16x16
    "v6e_256": (256, 32, 128),  # v6e:16x16
    "v5p_512": (512, 95, 128),  # v5p:8x8x8
    "h100_64": (64, 80, 8),  # 8 hosts of 8
    "h200_64": (64, 141, 8),
    "h200_8": (8, 141, 8),  # one host
}


def place(c: ConfigDict, name: str) -> None:
    """Mesh, microbatches and remat of a run whose batch, frames and row length are set."""
    devices, gibibytes, near = CLUSTERS[name]
    # Fewer rows than devices: a row over several of them, if the recipe does not say so already.
    c.mesh.seq = max(c.mesh.seq, devices // c.train.batch)
    if c.mesh.seq > devices:
        raise ValueError(f"{c.name} splits a row over {c.mesh.seq} devices, {name} has fewer")
    c.mesh.fsdp = max(1, min(near, devices) // c.mesh.seq)
    c.mesh.data = devices // (c.mesh.fsdp * c.mesh.seq)
    # One row at a time on each device, or on each group of seq devices.
    c.train.accumulation = max(1, c.train.batch * c.mesh.seq // devices)
    if gibibytes < 80:
        return  # the least memory: layers and calls of the ViT are computed again
    # Measured on two H200 (docs/training.md); how much an H100 or a v5p keeps is an estimate.
    c.model.vit.frames_per_call = 0
    c.train.remat.vit_calls = False
    for part, saved in (("vit", ("attention",)), ("decoder", ("attention", "qkv"))):
        c.train.remat[part].policy = "names"
        c.train.remat[part].saved = saved
    if gibibytes > 100:
        c.train.remat.decoder.saved = ("attention", "qkv", "mlp")
