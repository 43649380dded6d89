"""What the stages share: the sizes of published models, and a run with every field set.

A config is a plain `ml_collections.ConfigDict`. Any field can be set on the command line
(`--config.train.steps=100`), and `--config=configs/long.py:size=tiny` passes "size=tiny" to
`get_config`. What each field means stands in `storm_jax/config.py`, beside its type.
"""

from ml_collections import ConfigDict

from configs import clusters


def vit(name: str) -> ConfigDict:
    """SigLIP (arXiv 2303.15343): "so400m" (patches of 14), "base" (patches of 16) or "tiny"."""
    c = ConfigDict()
    # SigLIP-So400m/14 as in PaliGemma at 448 pixels; 384 pixels: image_size=384, position_grid=27.
    c.image_size = {"so400m": 448, "base": 224, "tiny": 32}[name]
    c.patch_size = {"so400m": 14, "base": 16, "tiny": 8}[name]
    c.width = {"so400m": 1152, "base": 768, "tiny": 64}[name]
    c.mlp = {"so400m": 4304, "base": 3072, "tiny": 128}[name]
    c.layers = {"so400m": 27, "base": 12, "tiny": 1}[name]
    c.heads = {"so400m": 16, "base": 12, "tiny": 4}[name]
    c.position_grid = c.image_size // c.patch_size
    # From 0.02 the tiny model does not find its way within a few hundred steps.
    c.position_scale = {"so400m": 0.02, "base": 0.02, "tiny": 0.4}[name]
    c.output_layer = -1  # VILA takes -2
    c.norm_eps = 1e-6
    c.frames_per_call = {"so400m": 32, "base": 64, "tiny": 0}[name]
    return c


def decoder(name: str) -> ConfigDict:
    """A published text decoder, or "tiny"."""
    family = name.split("_")[0]
    sizes = {
        # vocabulary, width, layers, heads, kv heads, head dim, MLP, window
        "gemma2_2b": (256_000, 2304, 26, 8, 4, 256, 9216, 4096),
        "gemma2_9b": (256_000, 3584, 42, 16, 8, 256, 14336, 4096),
        "gemma3_1b": (262_144, 1152, 26, 4, 1, 256, 6912, 512),
        "gemma3_4b": (262_208, 2560, 34, 8, 4, 256, 10240, 1024),
        "gemma3_12b": (262_208, 3840, 48, 16, 8, 256, 15360, 1024),
        "qwen2_1_5b": (151_936, 1536, 28, 12, 2, 128, 8960, 0),
        "qwen2_7b": (152_064, 3584, 28, 28, 4, 128, 18944, 0),
        "tiny": (384, 64, 2, 4, 2, 16, 128, 64),
    }
    c = ConfigDict()
    (
        c.vocab_size,
        c.width,
        c.layers,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.mlp,
        c.window,
    ) = sizes[name]
    gemma = family != "qwen2"
    gemma2 = family == "gemma2"
    c.activation = "gelu_tanh" if gemma else "silu"
    c.norm_eps = 1e-6
    c.norm_plus_one = gemma
    c.post_norms = gemma
    c.qkv_bias = not gemma
    c.qk_norm = gemma and not gemma2
    c.query_scale = 0.0  # head_dim ** -0.5 in all of these
    c.attention_softcap = 50.0 if gemma2 else 0.0
    c.logit_softcap = 30.0 if gemma2 else 0.0
    c.global_every = {"gemma2": 2, "gemma3": 6, "qwen2": 1, "tiny": 2}[family]
    c.rope_theta = 10_000.0 if gemma2 else 1_000_000.0
    c.rope_theta_local = 10_000.0
    c.rope_scaling = 8.0 if name in ("gemma3_4b", "gemma3_12b") else 1.0
    c.tied_embeddings = name != "qwen2_7b"
    c.scale_embeddings = gemma
    return c


# Tokenizers of the published decoders: hub ids, or set config.data.tokenizer to a local folder.
TOKENIZERS = {
    "gemma2_2b": "google/gemma-2-2b-it",
    "gemma2_9b": "google/gemma-2-9b-it",
    "gemma3_1b": "google/gemma-3-1b-it",
    "gemma3_4b": "google/gemma-3-4b-it",
    "gemma3_12b": "google/gemma-3-12b-it",
    "qwen2_1_5b": "Qwen/Qwen2-1.5B-Instruct",
    "qwen2_7b": "Qwen/Qwen2-7B-Instruct",
    "tiny": "data/synthetic/tokenizer",
}


def arguments(arg: str | None, default: str) -> tuple[str, str]:
    """(size, cluster) from the text behind the colon of `--config=FILE:size=NAME,cluster=NAME`."""
    chosen = {"size": default, "cluster": ""}
    names = {"size": TOKENIZERS, "cluster": clusters.CLUSTERS}
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        if key not in names or value not in names[key]:
            offered = "; ".join(f"{k}= one of {', '.join(v)}" for k, v in names.items())
            raise ValueError(
                f"config argument {item!r} is not understood: write size=NAME,cluster=NAME or one"
                f" of them, {offered}"
            )
        chosen[key] = value
    if chosen["size"] == "tiny" and chosen["cluster"]:
        raise ValueError("size=tiny runs on one device: leave cluster out")
    return chosen["size"], chosen["cluster"]


def source(path: str, media_root: str = "", weight: float = 1.0) -> ConfigDict:
    """One data set: its file or files, folder of its media ("": beside them), share."""
    c = ConfigDict(dict(path=path, media_root=media_root, weight=weight))
    c.format = ""  # as the path's ending says
    c.split = "train"  # of a TFDS data set
    return c


def run(name: str, size: str) -> ConfigDict:
    """A run of one size with every field set; stages change what they are about."""
    tiny = size == "tiny"
    c = ConfigDict()
    c.name = f"{name}_{size}"

    c.model = ConfigDict()
    c.model.vit = vit("tiny" if tiny else "so400m")
    c.model.projector = ConfigDict(dict(shuffle=2, norm=True, norm_eps=1e-6))
    if tiny:
        c.model.projector.shuffle = 4  # a frame is one token
    c.model.temporal = ConfigDict()
    c.model.temporal.layers = 1 if tiny else 2  # the paper does not say; see docs/decisions.md
    c.model.temporal.mixer = "mamba"  # controls: "mlp", "attention", "convolution"
    c.model.temporal.heads = 0  # of "attention"; 0: as many as match Mamba's parameters
    c.model.temporal.direction = "bidirectional"  # "forward": the paper's streaming variant
    c.model.temporal.expand = 2
    c.model.temporal.state = 16
    c.model.temporal.conv = 4
    c.model.temporal.dt_rank = 0  # ceil(width / 16)
    # Step sizes at the start. The usual 0.001 to 0.1 remember 10 to 1,000 tokens; the tiny model
    # has 8.
    c.model.temporal.dt_min = 0.1 if tiny else 1e-3
    c.model.temporal.dt_max = 1.0 if tiny else 0.1
    c.model.temporal.norm_eps = 1e-6
    c.model.reduction = ConfigDict()
    c.model.reduction.temporal_pool = 4  # the paper's best model averages 4 frames
    c.model.reduction.spatial_pool = 1
    c.model.reduction.temporal_sampling = 1  # training-free: set it when answering
    c.model.decoder = decoder(size)
    c.model.dtype = "float32" if tiny else "bfloat16"

    c.data = ConfigDict()
    c.data.train = (source("data/synthetic/train.jsonl"),)
    c.data.eval = (source("data/synthetic/test.jsonl"),)
    c.data.frames = ConfigDict(dict(max_frames=8, fps=0.0, keyframes_only=False))
    c.data.tokenizer = TOKENIZERS[size]
    c.data.chat_template = "qwen2" if size.startswith("qwen2") else "gemma"
    c.data.sequence_length = 40 if tiny else 1024
    c.data.row_frames = 8
    c.data.pack = not tiny  # a tiny row holds one clip
    c.data.decode_timeout = 30.0  # seconds a file
    c.data.max_bad_fraction = 0.02
    c.data.workers = 0 if tiny else 16
    c.data.prefetch_megabytes = 256 if tiny else 16_384
    c.data.seed = 0

    c.train = ConfigDict()
    c.train.steps = 1200
    c.train.batch = 64  # rows, over all devices
    c.train.accumulation = 1
    c.train.optimizer = ConfigDict()
    rate = 2e-3 if tiny else 2e-5
    c.train.optimizer.rates = ConfigDict(
        dict(vit=rate, projector=rate, temporal=rate, decoder=rate)
    )
    c.train.optimizer.kind = "adamw"  # "adafactor" has next to no state
    c.train.optimizer.warmup_fraction = 0.03  # as VILA
    c.train.optimizer.final_fraction = 0.0
    c.train.optimizer.beta1 = 0.9
    c.train.optimizer.beta2 = 0.999
    c.train.optimizer.eps = 1e-8
    c.train.optimizer.first_moment = "float32"
    c.train.optimizer.weight_decay = 0.0  # as VILA
    c.train.optimizer.clip_norm = 1.0
    c.train.z_loss = 0.0 if tiny else 1e-4
    c.train.remat = ConfigDict()
    for part in ("vit", "temporal", "decoder"):
        # `saved`: what the policies "names" and "offload" keep.
        c.train.remat[part] = ConfigDict(dict(policy="none" if tiny else "full", saved=()))
    c.train.remat.vit_calls = not tiny
    c.train.checkpoint = ConfigDict(dict(every=200 if tiny else 500, keep=3))
    c.train.log_every = 10
    c.train.eval_every = 0  # at the end
    c.train.eval_samples = 1000 if tiny else 0
    c.train.seed = 1 if tiny else 0
    c.train.skip_nonfinite = 0  # the first one stops the run
    c.train.divergence = ConfigDict(dict(factor=2.0, window=100, steps=20))
    c.train.watchdog = 1800.0  # seconds
    c.train.preemption_grace = 600.0  # seconds
    c.train.compile_cache = True
    c.train.log_records = False

    # Parameters sharded over all chips by default; raise seq where a row outgrows a chip, tensor
    # where a layer does.
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, seq=1, slices=1))
    # Checkpoints of an earlier stage: all parts, or one by one. "" starts at random. On the command
    # line --config.init_from=CKPT sets all.
    c.init_from = ConfigDict(dict(all="", vit="", projector="", temporal="", decoder=""))
    return c
