"""STORM (arXiv 2503.04130) for PyTorch: long videos through Mamba layers into a text decoder.

Axis letters: F frames, N tokens of a frame, D width, V visual tokens, B rows, S tokens of a row.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_storm import StormConfig
from .temporal_storm import Direction, TemporalEncoder


class Projector(nn.Module):
    """[F, N_v, D_v] -> [F, N, D]: neighbouring patches joined, LayerNorm, one linear map."""

    def __init__(self, config: StormConfig):
        super().__init__()
        self.shuffle = config.projector_shuffle
        channels = config.vision_config.hidden_size * self.shuffle**2
        eps = config.projector_norm_eps
        self.norm = nn.LayerNorm(channels, eps=eps) if config.projector_norm else nn.Identity()
        self.linear = nn.Linear(channels, config.text_config.hidden_size)

    def forward(self, x_FND):
        side, factor = math.isqrt(x_FND.shape[1]), self.shuffle
        cells = math.ceil(side / factor)
        more = cells * factor - side  # a grid that the factor does not divide ends in zeros
        x = F.pad(x_FND.unflatten(1, (side, side)), (0, 0, 0, more, 0, more))
        x = x.unflatten(2, (cells, factor)).unflatten(1, (cells, factor)).transpose(2, 3)
        return self.linear(self.norm(x.flatten(3).flatten(1, 2)))


class Reduction(nn.Module):
    """Means over windows of tokens and over consecutive frames; every s-th mean is kept."""

    def __init__(self, config: StormConfig):
        super().__init__()
        self.config = config

    def forward(self, x_BFND):
        """[B, F, N, D], videos of F frames -> [B, V, D]."""
        config = self.config
        if config.spatial_pool > 1:
            pool, side = config.spatial_pool, math.isqrt(x_BFND.shape[2])
            x = x_BFND.unflatten(2, (side // pool, pool, side // pool, pool))
            x_BFND = x.float().mean(dim=(3, 5)).to(x_BFND.dtype).flatten(2, 3)
        groups = x_BFND.split(config.temporal_pool, dim=1)[:: config.temporal_sampling]
        # The last group averages the frames that are left.
        means = [group.float().mean(dim=1) for group in groups]
        return torch.stack(means, 1).to(x_BFND.dtype).flatten(1, 2)


class StormForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Frames and tokens in, scores of the next token out."""

    config_class = StormConfig
    main_input_name = "input_ids"
    input_modalities = ["video", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaLayer", "SiglipVisionEmbeddings"]  # and those of the two parts
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StormConfig):
        super().__init__(config)
        _keep_softcap(config.text_config)
        width = config.text_config.hidden_size
        self.vision_tower = SiglipVisionModel._from_config(config.vision_config)
        if config.vision_output_layer == -2:
            self.vision_tower.post_layernorm = nn.Identity()  # pyrefly: ignore[bad-assignment]
        self.projector = Projector(config)
        self.temporal = TemporalEncoder(config, width)
        self.reduction = Reduction(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Direction):
            config = self.config
            E, G = module.A_log.shape
            bound = config.temporal_conv**-0.5
            init.uniform_(module.conv1d.weight, -bound, bound)
            init.normal_(module.dt_proj.weight, std=len(module.dt_proj.weight[0]) ** -0.5)
            init.copy_(module.A_log, torch.log(torch.arange(1.0, G + 1)).expand(E, G))
            init.ones_(module.D)
            low, high = math.log(config.temporal_dt_min), math.log(config.temporal_dt_max)
            dt = torch.exp(torch.empty(E).uniform_(low, high))
            init.copy_(module.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_videos(self, pixel_values_videos, frame_counts):
        """The visual tokens of videos, one video after another.

        Args:
            pixel_values_videos: [F, 3, image_size, image_size] in [-1, 1], the frames of all
                videos.
            frame_counts: int64 [videos], frames of each; an image is a video of one frame.

        Returns:
            [V, D].
        """
        counts = frame_counts.tolist()
        if sum(counts) != len(pixel_values_videos):
            raise ValueError(
                f"frame_counts {counts} sum to {sum(counts)}, but pixel_values_videos holds"
                f" {len(pixel_values_videos)} frames"
            )
        size = self.config.image_size
        if pixel_values_videos.shape[1:] != (3, size, size):
            raise ValueError(
                f"frames are {list(pixel_values_videos.shape[1:])}, not [3, {size}, {size}]:"
                " prepare them with the processor of this model"
            )
        x_FND = torch.cat(
            [
                self.projector(self._patches(frames))
                for frames in pixel_values_videos.split(self.config.frames_per_call or sum(counts))
            ]
        )
        videos = x_FND.split(counts)
        visual: list = [None] * len(videos)
        # Videos of one length go through the Mamba layers together, so that none needs padding.
        for count in set(counts):
            same = [i for i, other in enumerate(counts) if other == count]
            x_BFND = torch.stack([videos[i] for i in same])
            x_BLD = self.temporal(x_BFND.flatten(1, 2))
            reduced = self.reduction(x_BLD.unflatten(1, x_BFND.shape[1:3]))
            for i, tokens in zip(same, reduced, strict=True):
                visual[i] = tokens
        return torch.cat(visual)

    def _patches(self, frames):
        vision = self.config.vision_config
        # Conv2d leaves out the pixels that fill no patch.
        grid = self.config.image_size // vision.patch_size
        resize = grid != vision.image_size // vision.patch_size
        output = self.vision_tower(pixel_values=frames, interpolate_pos_encoding=resize)
        return output.last_hidden_state

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_counts: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids: int64 [B, S], video_token_id where a visual token stands.
            attention_mask: [B, S], 0 at padding on either side.
            position_ids: int64 [B, S]; they count from 0 at a row's first token if absent.
            inputs_embeds: [B, S, D] instead of input_ids, for text alone.
            pixel_values_videos: float [F, 3, H, W], frames of all videos, in the order in which
                the videos stand in the rows.
            frame_counts: int64 [videos], frames of each video.
            labels: int64 [B, S], the tokens themselves (they are shifted here); -100: no loss.
            logits_to_keep: scores of the last positions alone; 0: of all.
            kwargs: of the decoder: cache, use_cache, output_hidden_states, ...

        Returns:
            loss (if there are labels), logits [B, S, vocabulary], cache.
        """
        if (pixel_values_videos is None) != (frame_counts is None):
            raise ValueError("pixel_values_videos and frame_counts belong together")
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values_videos, frame_counts)
            if labels is not None:
                is_visual = input_ids == self.config.video_token_id
                labels = labels.masked_fill(is_visual.to(labels.device), -100)
        elif inputs_embeds is None or input_ids is not None:
            raise ValueError("give one of input_ids and inputs_embeds")
        elif pixel_values_videos is not None:
            raise ValueError("visual tokens are placed by input_ids, not by inputs_embeds")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            position_ids = position_ids[:, -inputs_embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(self, input_ids, pixel_values_videos, frame_counts):
        """What the decoder's first layer takes: tokens of the text, and visual ones among them."""
        is_visual = input_ids == self.config.video_token_id
        # video_token_id may have no row in the table.
        text = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        if pixel_values_videos is None:
            if input_ids.shape[1] > 1 and is_visual.any():
                raise ValueError("input_ids hold visual tokens, but there are no frames")
            return text
        visual = self.encode_videos(pixel_values_videos, frame_counts)
        if is_visual.sum() != len(visual):
            raise ValueError(
                f"input_ids hold {int(is_visual.sum())} visual tokens, but videos of"
                f" {frame_counts.tolist()} frames have {len(visual)}: temporal_sampling of the"
                " model and of the processor may differ, or a prompt was cut inside a video"
            )
        return text.masked_scatter(is_visual[..., None].to(text.device), visual.to(text))

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values_videos"] = inputs["frame_counts"] = None
        return inputs

    # pyrefly: ignore[bad-override]
    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats every row with its videos; a row's frames are not an entry of the first axis."""
        videos = {key: kwargs.pop(key, None) for key in ("pixel_values_videos", "frame_counts")}
        pixels, counts = videos.values()
        if input_ids is not None and pixels is not None and expand_size > 1:
            tokens = torch.tensor([self.config.visual_tokens(n) for n in counts.tolist()])
            per_row = (input_ids == self.config.video_token_id).sum(1).cpu()
            # The row in which a video's last token stands.
            rows = torch.searchsorted(per_row.cumsum(0), tokens.cumsum(0))
            frames, order = pixels.split(counts.tolist()), []
            for row in range(len(input_ids)):
                order += (rows == row).nonzero().flatten().tolist() * expand_size
            videos["pixel_values_videos"] = torch.cat([frames[video] for video in order])
            videos["frame_counts"] = counts[torch.tensor(order, device=counts.device)]
        # pyrefly: ignore[bad-argument-type]
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | {k: v for k, v in videos.items() if v is not None}


def _keep_softcap(text_config):
    """Gemma 2 caps its attention scores, which transformers' sdpa would leave out: eager then."""
    capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    if capped and text_config._attn_implementation in (None, "sdpa"):
        text_config._attn_implementation = "eager"


__all__ = ["StormForConditionalGeneration"]
