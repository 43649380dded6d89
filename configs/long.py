"""Stage 3, long videos: 128 frames, averaged by fours after the temporal encoder, all parts train.

    python -m storm_jax.train --config=configs/long.py --workdir=DIR --config.init_from=SFT_DIR
    python -m storm_jax.train --config=configs/long.py:size=tiny --workdir=DIR

The first needs a pod. The second trains the same path on a laptop's CPU, on videos that
`python -m storm_jax.data.synthetic --out=data/synthetic` makes, 8 frames each.
"""

from configs import clusters, common


def get_config(arg: str | None = None):
    size, cluster = common.arguments(arg, default="qwen2_7b")  # the paper's decoder
    c = common.run("long", size)
    if size == "tiny":
        return c
    # LLaVA-Video-178K, some 1.35 million video-text pairs (paper section 4.1), as one JSONL; see
    # docs/data.md. One pass.
    c.data.train = (common.source("data/llava_video_178k/train.jsonl"),)
    c.data.eval = (common.source("data/llava_video_178k/eval.jsonl"),)
    c.data.frames.max_frames = 128  # paper section 4.1
    c.data.row_frames = 128
    c.data.sequence_length = 9216  # 8K visual tokens (paper table 2) and 1K of text
    c.train.batch = 256  # not in the paper
    c.train.steps = 5_000  # 1.35M samples / 256 rows; short clips share a row
    if cluster:
        clusters.place(c, cluster)
    return c
