"""Stage 3 with videos of an hour: 2,048 frames a row, split over 16 devices.

    python -m storm_jax.train --config=configs/hour.py:cluster=v5p_512 --workdir=DIR \
        --config.init_from=LONG_DIR

Not in the paper, which stops at 128 frames in training. 524,288 tokens in the Mamba layers and
131,072 visual tokens in the decoder.
"""

from configs import clusters, common, long


def get_config(arg: str | None = None):
    size, cluster = common.arguments(arg, default="qwen2_7b")
    if size == "tiny":
        raise ValueError("configs/hour.py has no size=tiny: take configs/long.py")
    c = long.get_config(f"size={size}")
    c.name = f"hour_{size}"
    c.data.frames.max_frames = 2048
    c.data.row_frames = 2048
    c.data.sequence_length = 132_096  # 2,048 frames averaged by fours are 131,072 tokens
    # Attention gives whole heads to each device of a row: 8 for gemma3_4b, 128 frames a device for
    # the others.
    c.mesh.seq = min(16, c.model.decoder.heads)
    c.train.batch = 512 // c.mesh.seq
    c.train.steps = 2_000
    if cluster:
        clusters.place(c, cluster)
    return c
