"""A model configuration for tests of the data layer, which never build the model."""

from storm_jax import config


def small_model(
    image_size: int = 4,
    patch_size: int = 2,
    temporal_pool: int = 2,
    temporal_sampling: int = 1,
) -> config.ModelConfig:
    """(image_size / patch_size)^2 visual tokens for each group of temporal_pool frames."""
    return config.ModelConfig(
        vit=config.VitConfig(
            image_size=image_size,
            patch_size=patch_size,
            width=8,
            mlp=8,
            layers=1,
            heads=1,
            position_grid=2,
            position_scale=0.5,
        ),
        projector=config.ProjectorConfig(shuffle=1),
        temporal=config.TemporalConfig(),
        reduction=config.ReductionConfig(
            temporal_pool=temporal_pool, spatial_pool=1, temporal_sampling=temporal_sampling
        ),
        decoder=config.DecoderConfig(
            vocab_size=264,
            width=8,
            layers=1,
            heads=1,
            kv_heads=1,
            head_dim=8,
            mlp=8,
            activation="silu",
            norm_eps=1e-6,
            norm_plus_one=False,
            post_norms=False,
            qkv_bias=False,
            qk_norm=False,
            query_scale=0.0,
            attention_softcap=0.0,
            logit_softcap=0.0,
            global_every=1,
            window=0,
            rope_theta=1e4,
            rope_theta_local=1e4,
            rope_scaling=1.0,
            tied_embeddings=True,
            scale_embeddings=False,
        ),
        dtype="float32",
    )
