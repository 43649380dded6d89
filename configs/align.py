"""Stage 1, alignment on image-text pairs: projector and temporal encoder train, the rest is frozen.

    python -m storm_jax.train --config=configs/align.py --workdir=DIR \
        --config.init_from.vit=CKPT --config.init_from.decoder=CKPT
    python -m storm_jax.train --config=configs/align.py:size=tiny --workdir=DIR
"""

from configs import clusters, common


def get_config(arg: str | None = None):
    size, cluster = common.arguments(arg, default="qwen2_7b")
    c = common.run("align", size)
    # "temporal projector only" (paper section 4.1); the rate is VILA's.
    c.train.optimizer.rates.vit = 0.0
    c.train.optimizer.rates.decoder = 0.0
    c.train.optimizer.rates.projector = 1e-3
    c.train.optimizer.rates.temporal = 1e-3
    if size == "tiny":
        return c
    # LLaVA-CC3M-Pretrain-595K (paper appendix 8.4; section 4.1 says SVIT).
    c.data.train = (
        common.source("data/llava_cc3m_595k/chat.json", media_root="data/llava_cc3m_595k/images"),
    )
    c.data.eval = ()
    c.data.frames.max_frames = 1
    c.data.row_frames = 16
    c.data.sequence_length = 6144  # 16 images of 256 tokens and their captions
    c.train.batch = 128
    c.train.steps = 290  # 595K pairs / (128 rows x 16 pairs)
    if cluster:
        clusters.place(c, cluster)
    return c
