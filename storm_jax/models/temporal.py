"""The temporal encoder: Mamba layers over all tokens of a video (paper section 3.2).

Mamba-1 (arXiv 2312.00752). Both directions share the input and output projections; each has its
own convolution, x_proj, dt_proj, A and D. Their outputs are summed and gated once, and neither
direction flips a tensor.

Encoders of one direction also run stretch by stretch: `TemporalEncoder.carry` takes and returns
what the frames so far have left behind.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from storm_jax.config import ConfigError, Remat, TemporalConfig
from storm_jax.models.layers import KEEP_ALL, LayerNorm, Linear, Stack, parameter
from storm_jax.parallel import halo, sharding
from storm_kernels.causal_conv1d import causal_conv1d
from storm_kernels.selective_scan import (
    Layout,
    preferred_layout,
    selective_scan,
    selective_scan_sharded,
)


class TemporalState(NamedTuple):
    """What frames leave behind for those that follow, with a leading axis of layers."""

    conv: jax.Array  # [B, K - 1, E], the convolution's last inputs, in the activations' dtype
    scan: jax.Array  # [B, E, G] float32


def empty_state(config: TemporalConfig, width: int, rows: int, dtype: jnp.dtype) -> TemporalState:
    """The state before the first frame of `rows` videos.

    Args:
      config: of the encoder.
      width: of its tokens.
      dtype: of its activations.

    Raises:
      ConfigError: the encoder also runs backward in time, or it is not of Mamba layers.
    """
    if config.mixer != "mamba":
        raise ConfigError(
            f"temporal.mixer={config.mixer!r} carries no state from frame to frame: a stream needs"
            ' a checkpoint trained with "mamba" and temporal.direction="forward"'
        )
    if config.direction != "forward":
        raise ConfigError(
            f"temporal.direction={config.direction!r} sees all frames before it says something"
            ' about the first: a stream needs a checkpoint trained with "forward"'
        )
    E = config.expand * width
    conv = jnp.zeros((config.layers, rows, config.conv - 1, E), dtype)
    scan = jnp.zeros((config.layers, rows, E, config.state), jnp.float32)
    return TemporalState(
        sharding.shard(conv, "layers", "batch", None, "inner"),
        sharding.shard(scan, "layers", "batch", "inner", None),
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

    def __call__(
        self,
        x: jax.Array,
        segments_BL: jax.Array,
        layout: Layout,
        state: TemporalState | None = None,
    ) -> tuple[jax.Array, TemporalState | None]:
        """Args:
          x: [B, L, E] in layout "bld", [B, E, L] in "bdl", and so is the result.
          segments_BL: int32; with a state all of a row's tokens are 0, and padding (-1) is behind
            them.
          state: of the positions before, of one layer. The length is not split over devices then.

        Returns:
          The result, and the state behind the last token where one was given.
        """
        length = "length" if state is None else None
        inner = ("batch", length, "inner") if layout == "bld" else ("batch", "inner", length)
        row = ("batch", length)
        axis_name = None
        if state is None:
            axis_name = sharding.split_axis("length", segments_BL.shape[1])
        # Axes of the states, where there are any.
        before = () if state is None else (("batch", None, "inner"),)
        after = () if state is None else (("batch", "inner", None),)
        conv = sharding.per_device(
            functools.partial(self._conv, layout, axis_name),
            (inner, row, (None, "inner"), ("inner",), *before),
            (inner, *before),
        )
        x, *conv_state = conv(
            x, segments_BL, self.conv_weight[...], self.conv_bias[...], *(state or ())[:1]
        )
        projected = self.x_proj(x) if layout == "bld" else self.x_proj.from_channels_first(x)
        R, G = self.dt_rank, self.state
        dt_BLR, B_BLG, C_BLG = jnp.split(projected, [R, R + G], axis=-1)
        if layout == "bld":
            dt = self.dt_proj(dt_BLR)
        else:
            dt = jnp.swapaxes(self.dt_proj.to_channels_first(dt_BLR), 0, 1)
        shared = ("batch", length, None)
        scan = sharding.per_device(
            functools.partial(self._scan, layout, axis_name),
            (inner, inner, ("inner", None), shared, shared, ("inner",), ("inner",), row, *after),
            (inner, *after),
        )
        A = -jnp.exp(self.A_log[...])
        bias = self.dt_bias[...]
        y, *scan_state = scan(
            x, dt, A, B_BLG, C_BLG, self.D[...], bias, segments_BL, *(state or ())[1:]
        )
        return y, None if state is None else TemporalState(*conv_state, *scan_state)

    def _conv(self, layout, axis_name, x, segments, weight, bias, before=None):
        beside = before
        if axis_name is not None:
            beside = halo.conv_state(
                x,
                segments,
                weight.shape[0] - 1,
                axis_name=axis_name,
                reverse=self.reverse,
                layout=layout,
            )
        y = causal_conv1d(
            x,
            weight,
            bias,
            segment_ids=segments,
            initial_state=beside,
            reverse=self.reverse,
            activation="silu",
            layout=layout,
        )
        return (y,) if before is None else (y, _last_inputs(before, x, segments, layout))

    def _scan(self, layout, axis_name, u, delta, A, B, C, D, delta_bias, segments, before=None):
        scan = selective_scan
        if axis_name is not None:
            scan = functools.partial(selective_scan_sharded, axis_name=axis_name)
        if before is not None:
            scan = functools.partial(selective_scan, initial_state=before, return_final_state=True)
        result = scan(
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
        return (result,) if before is None else result


def _last_inputs(
    before_BKE: jax.Array, x: jax.Array, segments_BL: jax.Array, layout: Layout
) -> jax.Array:
    """The last inputs of a convolution that are not padding, as many as there were `before`.

    `causal_conv1d` counts padding as places and would return zeros for it.
    """
    x_BLE = x if layout == "bld" else jnp.swapaxes(x, 1, 2)
    width = before_BKE.shape[1]
    places = jnp.concatenate([before_BKE, x_BLE.astype(before_BKE.dtype)], axis=1)
    end = jnp.sum(segments_BL >= 0, axis=1)

    def last(places, end):
        return jax.lax.dynamic_slice_in_dim(places, end, width, axis=0)

    return jax.vmap(last)(places, end)


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

    def __call__(
        self, x_BLD: jax.Array, segments_BL: jax.Array, state: TemporalState | None = None
    ) -> tuple[jax.Array, TemporalState | None]:
        """Args and result: as `Direction`; the state is that of the forward direction."""
        # The projections write the layout that the platform's scan reads fastest.
        layout = preferred_layout(x_BLD)
        if layout == "bld":
            projected = checkpoint_name(self.in_proj(self.norm(x_BLD)), "mamba")
            u, z = projected[:, :, 0], projected[:, :, 1]
        else:
            projected = self.in_proj.to_channels_first(self.norm(x_BLD))
            u, z = jnp.swapaxes(checkpoint_name(projected, "mamba"), 1, 2)
        y, state = self.forward(u, segments_BL, layout, state)
        if self.backward is not None:
            assert state is None, "`empty_state` gives none to such an encoder"
            y = y + self.backward(u, segments_BL, layout)[0]
        y = y * jax.nn.silu(z)
        if layout == "bld":
            return x_BLD + self.out_proj(y), state
        return x_BLD + self.out_proj.from_channels_first(y), state


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
            return layer(x_BLD, segments_BL)

        x_BLD = sharding.reshape(x_BFND, B, F * N, D)
        x_BLD, _ = self.blocks.scan(body, x_BLD, remat=remat)
        return sharding.reshape(x_BLD, B, F, N, D)

    def carry(
        self, x_BFND: jax.Array, frame_segments_BF: jax.Array, state: TemporalState
    ) -> tuple[jax.Array, TemporalState]:
        """The next frames of videos, one video a row, as if all frames were given at once.

        Args:
          x_BFND: tokens of every frame.
          frame_segments_BF: int32, negative where a frame is padding, which changes nothing and
            comes back as it is, wherever it stands. All others are of the row's video.
          state: from the frames before, or `empty_state`.

        Returns:
          [B, F, N, D], and the state behind the last frame.
        """
        B, F, N, D = x_BFND.shape
        # Padding goes behind the frames: a convolution counts by places.
        order_BF = jnp.argsort(frame_segments_BF < 0, axis=1)
        segments_BF = jnp.sort(jnp.where(frame_segments_BF < 0, -1, 0), axis=1, descending=True)
        segments_BL = sharding.shard(jnp.repeat(segments_BF, N, axis=1), "batch", None)

        def body(layer, x_BLD, layer_state):
            return layer(x_BLD, segments_BL, layer_state)

        x_BLD = sharding.reshape(_frames_at(x_BFND, order_BF), B, F * N, D)
        x_BLD, state = self.blocks.scan(body, x_BLD, state)
        x_BFND = sharding.reshape(x_BLD, B, F, N, D)
        return _frames_at(x_BFND, jnp.argsort(order_BF, axis=1)), state


def _frames_at(x_BFND: jax.Array, index_BF: jax.Array) -> jax.Array:
    """Frames in another order."""

    def pick(x, index):
        return jnp.take_along_axis(x, index[:, :, None, None], axis=1)

    axes = ("batch", None, None, None)
    return sharding.per_device(pick, (axes, ("batch", None)), axes)(x_BFND, index_BF)
