"""The temporal encoder: Mamba layers over all tokens of a video (paper section 3.2).

Mamba-1 (arXiv 2312.00752). Both directions share the input and output projections; each has its
own convolution, x_proj, dt_proj, A and D. Their outputs are summed and gated once, and neither
direction flips a tensor.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from storm_jax.config import TemporalConfig
from storm_jax.models.layers import KEEP_ALL, LayerNorm, Linear, Remat, Stack, parameter
from storm_jax.parallel import halo, sharding
from storm_kernels.causal_conv1d import causal_conv1d
from storm_kernels.selective_scan import (
    Layout,
    preferred_layout,
    selective_scan,
    selective_scan_sharded,
)


class Direction(nnx.Module):
    """Convolution and selective scan in one direction, over E inner channels with G states each."""

    def __init__(self, config: TemporalConfig, width: int, *, reverse: bool, rngs: nnx.Rngs):
        E, G, K = config.expand * width, config.state, config.conv
        R = config.dt_rank or math.ceil(width / 16)
        self.reverse = reverse
        self.dt_rank, self.state = R, G
        bound = 1 / math.sqrt(K)
        taps = jax.random.uniform(rngs.params(), (K, E), minval=-bound, maxval=bound)
        self.conv_weight = parameter(taps, None, "inner")
        self.conv_bias = parameter(jnp.zeros(E), "inner")
        self.x_proj = Linear((E,), (R + 2 * G,), ("inner", None), rngs=rngs)
        self.dt_proj = Linear((R,), (E,), (None, "inner"), rngs=rngs)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (E,), minval=low, maxval=high))
        # softplus(dt_bias) = dt
        self.dt_bias = parameter(dt + jnp.log(-jnp.expm1(-dt)), "inner")
        rates = jnp.tile(jnp.arange(1, G + 1, dtype=jnp.float32), (E, 1))
        self.A_log = parameter(jnp.log(rates), "inner", None)  # S4D-real initialisation
        self.D = parameter(jnp.ones(E), "inner")

    def __call__(self, x: jax.Array, segments_BL: jax.Array, layout: Layout) -> jax.Array:
        """Args: x: [B, L, E] in layout "bld", [B, E, L] in "bdl", and so is the result."""
        inner = ("batch", "length", "inner") if layout == "bld" else ("batch", "inner", "length")
        row = ("batch", "length")
        axis_name = sharding.split_axis("length", segments_BL.shape[1])
        conv = functools.partial(self._conv, layout, axis_name)
        conv = sharding.per_device(conv, (inner, row, (None, "inner"), ("inner",)), inner)
        x = conv(x, segments_BL, self.conv_weight[...], self.conv_bias[...])
        projected = self.x_proj(x) if layout == "bld" else self.x_proj.from_channels_first(x)
        R, G = self.dt_rank, self.state
        dt_BLR, B_BLG, C_BLG = jnp.split(projected, [R, R + G], axis=-1)
        if layout == "bld":
            dt = self.dt_proj(dt_BLR)
        else:
            dt = jnp.swapaxes(self.dt_proj.to_channels_first(dt_BLR), 0, 1)
        shared = ("batch", "length", None)
        scan = sharding.per_device(
            functools.partial(self._scan, layout, axis_name),
            (inner, inner, ("inner", None), shared, shared, ("inner",), ("inner",), row),
            inner,
        )
        A = -jnp.exp(self.A_log[...])
        bias = self.dt_bias[...]
        return scan(x, dt, A, B_BLG, C_BLG, self.D[...], bias, segments_BL)

    def _conv(self, layout, axis_name, x, segments, weight, bias):
        beside = None
        if axis_name is not None:
            beside = halo.conv_state(
                x,
                segments,
                weight.shape[0] - 1,
                axis_name=axis_name,
                reverse=self.reverse,
                layout=layout,
            )
        return causal_conv1d(
            x,
            weight,
            bias,
            segment_ids=segments,
            initial_state=beside,
            reverse=self.reverse,
            activation="silu",
            layout=layout,
        )

    def _scan(self, layout, axis_name, u, delta, A, B, C, D, delta_bias, segments):
        scan = selective_scan
        if axis_name is not None:
            scan = functools.partial(selective_scan_sharded, axis_name=axis_name)
        return scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            delta_bias=delta_bias,
            delta_softplus=True,
            segment_ids=segments,
            reverse=self.reverse,
            layout=layout,
        )


class MambaLayer(nnx.Module):
    """x + Mixer(LayerNorm(x))."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        E = config.expand * width
        self.norm = LayerNorm(width, config.norm_eps)
        self.in_proj = Linear((width,), (2, E), ("embed", None, "inner"), rngs=rngs)
        self.forward = Direction(config, width, reverse=False, rngs=rngs)
        both = config.direction == "bidirectional"
        self.backward = Direction(config, width, reverse=True, rngs=rngs) if both else None
        self.out_proj = Linear((E,), (width,), ("inner", "embed"), rngs=rngs)

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
        # The projections write the layout that the platform's scan reads fastest.
        layout = preferred_layout(x_BLD)
        if layout == "bld":
            projected = checkpoint_name(self.in_proj(self.norm(x_BLD)), "mamba")
            u, z = projected[:, :, 0], projected[:, :, 1]
        else:
            projected = self.in_proj.to_channels_first(self.norm(x_BLD))
            u, z = jnp.swapaxes(checkpoint_name(projected, "mamba"), 1, 2)
        y = self.forward(u, segments_BL, layout)
        if self.backward is not None:
            y = y + self.backward(u, segments_BL, layout)
        y = y * jax.nn.silu(z)
        if layout == "bld":
            return x_BLD + self.out_proj(y)
        return x_BLD + self.out_proj.from_channels_first(y)


class TemporalEncoder(nnx.Module):
    """Mixes tokens row by row within a frame and frame by frame, never across videos."""

    def __init__(self, config: TemporalConfig, width: int, rngs: nnx.Rngs):
        self.blocks = Stack(lambda r: MambaLayer(config, width, r), config.layers, rngs=rngs)

    def __call__(
        self, x_BFND: jax.Array, frame_segments_BF: jax.Array, remat: Remat = KEEP_ALL
    ) -> jax.Array:
        """Args:
          x_BFND: tokens of every frame, split over devices along B and F at most.
          frame_segments_BF: int32, the video that a frame belongs to; negative: padding, which
            neither changes a state nor reaches a neighbour.
          remat: what the backward pass recomputes, see `Remat`.

        Returns:
          [B, F, N, D].
        """
        B, F, N, D = x_BFND.shape
        segments_BL = sharding.shard(jnp.repeat(frame_segments_BF, N, axis=1), "batch", "length")

        def body(layer, x_BLD, _):
            return layer(x_BLD, segments_BL), None

        x_BLD = sharding.reshape(x_BFND, B, F * N, D)
        x_BLD, _ = self.blocks.scan(body, x_BLD, remat=remat)
        return sharding.reshape(x_BLD, B, F, N, D)
