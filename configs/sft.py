"""Stage 2, supervised fine-tuning on text, images and videos of up to 32 frames; all parts train.

python -m storm_jax.train --config=configs/sft.py --workdir=DIR --config.init_from=ALIGN_DIR
python -m storm_jax.train --config=configs/sft.py:size=tiny --workdir=DIR
"""

from configs import clusters, common


def get_config(arg: str | None = None):
    size, cluster = common.arguments(arg, default="qwen2_7b")
    c = common.run("sft", size)
    if size == "tiny":
        return c
    # The paper mixes some 12.5 million samples (table 8) without giving weights. List your sets
    # here; weights are shares of the samples.
    c.data.train = (
        common.source("data/llava_onevision/single_image.jsonl", weight=4.0),
        common.source("data/llava_video_178k/train.jsonl", weight=1.0),
    )
    c.data.eval = (common.source("data/llava_video_178k/eval.jsonl"),)
    c.data.frames.max_frames = 32  # paper section 4.1
    c.data.row_frames = 128  # four videos, or more images, share a row
    c.data.sequence_length = 16_384
    c.train.batch = 512  # not in the paper
    c.train.steps = 10_000
    if cluster:
        clusters.place(c, cluster)
    return c
