"""Configuration of STORM (arXiv 2503.04130): SigLIP, projector, Mamba, reduction, decoder."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig


class StormConfig(PreTrainedConfig):
    r"""
    Args:
        vision_config: of the SigLIP tower. Its image_size gives the side of the table of position
            embeddings (image_size // patch_size), which is resized where the input is of another.
        text_config: of the decoder, a Gemma, Gemma 2, Gemma 3 or Qwen2 text model.
        video_token_id: id at the positions of input_ids where a visual token stands; it may lie
            outside the vocabulary.
        image_size: side of the square input frames, pixels.
        frames_per_call: frames that the vision tower takes at once; 0: all.
        vision_output_layer: -1: the last layer's output and the final norm; -2: without the last
            layer and the norm. vision_config.num_hidden_layers counts the layers that are run.
        projector_shuffle: this many patches squared are joined into one token.
        projector_norm, projector_norm_eps: LayerNorm before the linear map.
        temporal_layers: Mamba layers over all tokens of a video; 0: none.
        temporal_direction: "bidirectional" or "forward".
        temporal_expand, temporal_state, temporal_conv, temporal_dt_rank: inner width / width,
            states a channel, taps, rank of the step size (0: ceil(width / 16)).
        temporal_dt_min, temporal_dt_max: range of the step sizes at initialisation.
        temporal_norm_eps: of the LayerNorm before each Mamba layer.
        temporal_pool: mean over this many consecutive frames.
        spatial_pool: mean over windows of this many tokens squared.
        temporal_sampling: every so many pooled frames are kept. Needs no training; the processor
            must use the same number.
        storm_jax: the run that trained the model, for the way back to JAX.
    """

    model_type = "storm"
    # pyrefly: ignore[bad-override]
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    video_token_id: int | None = None
    image_size: int = 448
    frames_per_call: int = 64
    vision_output_layer: int = -1
    projector_shuffle: int = 2
    projector_norm: bool = True
    projector_norm_eps: float = 1e-6
    temporal_layers: int = 2
    temporal_direction: str = "bidirectional"
    temporal_expand: int = 2
    temporal_state: int = 16
    temporal_conv: int = 4
    temporal_dt_rank: int = 0
    temporal_dt_min: float = 1e-3
    temporal_dt_max: float = 0.1
    temporal_norm_eps: float = 1e-6
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sampling: int = 1
    tie_word_embeddings: bool = True
    storm_jax: dict | None = None

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = SiglipVisionConfig(vision_use_head=False)
        elif isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig(**self.vision_config)
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("gemma3_text")
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.video_token_id is None:
            self.video_token_id = self.text_config.vocab_size
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> int:
        """Tokens along one side of a frame, between projector and reduction."""
        patches = self.image_size // self.vision_config.patch_size
        return math.ceil(patches / self.projector_shuffle)

    def visual_tokens(self, frames: int) -> int:
        """Visual tokens that stand for a video of `frames` frames in input_ids; an image has 1."""
        pooled = math.ceil(frames / self.temporal_pool)
        kept = math.ceil(pooled / self.temporal_sampling)
        return kept * (self.grid // self.spatial_pool) ** 2


__all__ = ["StormConfig"]
