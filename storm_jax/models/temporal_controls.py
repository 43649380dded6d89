"""Controls for the temporal encoder: what stands in the place of Mamba to see what Mamba is for.

Layers x + Mixer(LayerNorm(x)) like Mamba's, with as many parameters (`TemporalConfig.hidden` and
`attention_heads` say how near), the same input and the same segments. What a mixer can see:

  mlp          the token itself: a gated MLP. More depth and nothing of other tokens.
  convolution  also the same place in the frames beside it: the temporal shift of TSM (arXiv
               1811.08383), then that MLP. It adds no parameter to it.
  attention    the same place in all frames of the video: divided attention of TimeSformer (arXiv
               2102.05095), with rotary positions (arXiv 2104.09864) that count frames within the
               video.

None mixes places within a frame, as Mamba does. With `direction="forward"` the shift brings
channels from the past alone and attention is causal. None carries a state from one stretch of a
video to the next, and the two that look at other frames need all frames of a row on each device.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from storm_jax.config import ConfigError, Remat, TemporalConfig
from storm_jax.models.attention import self_attention
from storm_jax.models.layers import KEEP_ALL, LayerNorm, Linear, Stack, rotary, rotate
from storm_jax.parallel import sharding
from storm_jax.parallel.checks import split_frames

ROTARY_THETA = 10_000.0
_SHIFTED = 8  # TSM's residual shift moves an eighth of the channels in each direction


class MlpMixer(nnx.Module):
    """down(silu(gate(x)) * up(x)), token by token."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        M = config.hidden(width)
        self.up = Linear((width,), (2, M), ("embed", None, "inner"), rngs=rngs)
        self.down = Linear((M,), (width,), ("inner", "embed"), rngs=rngs)

    def __call__(self, x_PFD: jax.Array, segments_PF: jax.Array) -> jax.Array:
        """Args: x_PFD: P places over F frames; segments_PF: int32; result: as x."""
        hidden = checkpoint_name(self.up(x_PFD), "mlp")
        return self.down(jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1])


class ConvolutionMixer(nnx.Module):
    """Some channels from the frame before, some from the frame behind, then an MLP."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        self.bidirectional = config.direction == "bidirectional"
        self.shifted = max(1, width // _SHIFTED)
        self.mlp = MlpMixer(config, width, rngs)

    def __call__(self, x_PFD: jax.Array, segments_PF: jax.Array) -> jax.Array:
        """Args and result: as `MlpMixer`. A video begins and ends with zeros."""
        return self.mlp(self.shift(x_PFD, segments_PF), segments_PF)

    def shift(self, x_PFD: jax.Array, segments_PF: jax.Array) -> jax.Array:
        """The first channels one frame later, with both directions the next ones one earlier."""
        n = self.shifted
        same = (segments_PF[:, 1:] == segments_PF[:, :-1])[:, :, None]
        before = jnp.pad(jnp.where(same, x_PFD[:, :-1, :n], 0), ((0, 0), (1, 0), (0, 0)))
        if not self.bidirectional:
            return jnp.concatenate([before, x_PFD[:, :, n:]], axis=2)
        behind = jnp.pad(jnp.where(same, x_PFD[:, 1:, n : 2 * n], 0), ((0, 0), (0, 1), (0, 0)))
        return jnp.concatenate([before, behind, x_PFD[:, :, 2 * n :]], axis=2)


class AttentionMixer(nnx.Module):
    """Softmax attention of a place with itself over the frames of its video."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        H, C = config.attention_heads(width)
        self.causal = config.direction == "forward"
        self.scale = C**-0.5
        axes = ("embed", "heads", None)
        self.query = Linear((width,), (H, C), axes, rngs=rngs)
        self.key = Linear((width,), (H, C), axes, rngs=rngs)
        self.value = Linear((width,), (H, C), axes, rngs=rngs)
        self.out = Linear((H, C), (width,), ("heads", None, "embed"), rngs=rngs)

    def __call__(self, x_PFD: jax.Array, segments_PF: jax.Array) -> jax.Array:
        """Args and result: as `MlpMixer`."""
        q, k, v = self.query(x_PFD), self.key(x_PFD), self.value(x_PFD)
        cos, sin = rotary(frame_positions(segments_PF), q.shape[-1], ROTARY_THETA)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.out(self_attention(q, k, v, segments_PF, causal=self.causal, scale=self.scale))


def frame_positions(segments_PF: jax.Array) -> jax.Array:
    """The number of a frame within its video, int32 [P, F]."""
    index_PF = jax.lax.broadcasted_iota(jnp.int32, segments_PF.shape, 1)
    begins = jnp.pad(segments_PF[:, 1:] != segments_PF[:, :-1], ((0, 0), (1, 0)))
    return index_PF - jax.lax.cummax(jnp.where(begins, index_PF, 0), axis=1)


class ControlLayer(nnx.Module):
    """x + Mixer(LayerNorm(x)); padding goes through unchanged."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, config.norm_eps)
        match config.mixer:
            case "mlp":
                self.mixer = MlpMixer(config, width, rngs)
            case "convolution":
                self.mixer = ConvolutionMixer(config, width, rngs)
            case "attention":
                self.mixer = AttentionMixer(config, width, rngs)
            case "mamba":
                raise AssertionError("that is `temporal.MambaLayer`")

    def __call__(self, x_PFD: jax.Array, segments_PF: jax.Array) -> jax.Array:
        """Args and result: as `MlpMixer`."""
        valid = (segments_PF >= 0)[:, :, None]
        # Zeros, for what padding holds may be no number, and 0 times that is none either.
        y = self.mixer(jnp.where(valid, self.norm(x_PFD), 0), segments_PF)
        return x_PFD + jnp.where(valid, y, 0)


class ControlEncoder(nnx.Module):
    """In the place of `temporal.TemporalEncoder`; for mixers that are not "mamba"."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        self.config = config
        self.blocks = Stack(lambda r: ControlLayer(config, width, r), config.layers, rngs=rngs)

    def __call__(
        self, x_BFND: jax.Array, frame_segments_BF: jax.Array, remat: Remat = KEEP_ALL
    ) -> jax.Array:
        """Args:
          x_BFND: tokens of every frame, split over devices along B and F at most.
          frame_segments_BF: int32, the video that a frame belongs to. The frames of a video stand
            together and in order, padding (negative) is at the end of a row.
          remat: what the backward pass recomputes, see `Remat`.

        Returns:
          [B, F, N, D].

        Raises:
          ConfigError: frames are split over devices and the mixer looks at other frames.
        """
        if self.config.mixer != "mlp" and sharding.parts("frames") > 1:
            raise ConfigError(split_frames(self.config, sharding.parts("frames")))
        B, F, N, D = x_BFND.shape
        x_BNFD = jnp.swapaxes(x_BFND, 1, 2)
        x_PFD = sharding.reshape(x_BNFD, B * N, F, D)
        segments_BF = sharding.shard(frame_segments_BF, "batch", "frames")
        segments_BNF = jnp.broadcast_to(segments_BF[:, None], (B, N, F))
        segments_PF = sharding.reshape(segments_BNF, B * N, F)
        if self.config.mixer == "attention" and F % 2:  # cuDNN's with a mask takes even lengths
            x_PFD = jnp.pad(x_PFD, ((0, 0), (0, 1), (0, 0)))
            segments_PF = jnp.pad(segments_PF, ((0, 0), (0, 1)), constant_values=-1)
        x_PFD, _ = self.blocks.scan(
            lambda layer, x, _: (layer(x, segments_PF), None), x_PFD, remat=remat
        )
        return jnp.swapaxes(sharding.reshape(x_PFD[:, :F], B, N, F, D), 1, 2)
