"""SigLIP vision transformer (arXiv 2303.15343), as PaliGemma and STORM use it: no pooling head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from storm_jax.config import Remat, VitConfig
from storm_jax.models.attention import self_attention
from storm_jax.models.layers import KEEP_ALL, LayerNorm, Linear, Stack, add_bias, gelu, parameter
from storm_jax.parallel.frames import batches
from storm_jax.parallel.sharding import reshape, shard


class VitBlock(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        D, H, C = config.width, config.heads, config.width // config.heads
        self.norm1 = LayerNorm(D, config.norm_eps)
        # Frames are spread over all devices, so that no tensor parallelism is needed in here.
        axes = ("embed", "vit_heads", None)
        self.query = Linear((D,), (H, C), axes, bias=True, rngs=rngs)
        self.key = Linear((D,), (H, C), axes, bias=True, rngs=rngs)
        self.value = Linear((D,), (H, C), axes, bias=True, rngs=rngs)
        self.out = Linear((H, C), (D,), ("vit_heads", None, "embed"), bias=True, rngs=rngs)
        self.norm2 = LayerNorm(D, config.norm_eps)
        self.up = Linear((D,), (config.mlp,), ("embed", "vit_mlp"), bias=True, rngs=rngs)
        self.down = Linear((config.mlp,), (D,), ("vit_mlp", "embed"), bias=True, rngs=rngs)
        self.scale = C**-0.5

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        # float32 is for comparing: rounded in the places where the published model rounds.
        return self.as_published(x_BND) if x_BND.dtype == jnp.float32 else self.folded(x_BND)

    def as_published(self, x_BND: jax.Array) -> jax.Array:
        """The layer, operation by operation."""
        h = self.norm1(x_BND)
        q, k, v = self.query(h), self.key(h), self.value(h)
        x_BND = x_BND + self.out(self_attention(q, k, v, causal=False, scale=self.scale))
        h = checkpoint_name(self.up(self.norm2(x_BND)), "mlp")
        return x_BND + self.down(jax.nn.gelu(h, approximate=True))

    def folded(self, x_BND: jax.Array) -> jax.Array:
        """The same function with fewer passes over all tokens, forward and backward."""
        dtype = x_BND.dtype
        h = self.norm1.normalised(x_BND)
        (w_q, b_q), (w_k, _), (w_v, b_v) = (
            linear.after(self.norm1, dtype) for linear in (self.query, self.key, self.value)
        )
        q = add_bias(self.query.product(h, w_q), b_q).astype(dtype)
        # What is added to all keys adds one number to all scores of a query, which the softmax
        # takes away again. What is added to all values comes out unchanged, for weights add to 1.
        k, v = self.key.product(h, w_k), self.value.product(h, w_v)
        h = self_attention(q, k, v, causal=False, scale=self.scale)
        x_BND = x_BND + self.out.with_constant(h, b_v)
        w, b = self.up.after(self.norm2, dtype)
        h = checkpoint_name(self.up.product(self.norm2.normalised(x_BND), w), "mlp")
        return x_BND + self.down(gelu(add_bias(h, b)).astype(dtype))


class Vit(nnx.Module):
    """Every frame alone: [B, F, H, W, 3] -> [B, F, N, D_v]."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        self.config = config
        pixels = config.patch_size**2 * 3
        axes = (None, "embed")
        self.patch = Linear((pixels,), (config.width,), axes, bias=True, rngs=rngs)
        table = jax.random.normal(rngs.params(), (config.position_grid**2, config.width))
        self.positions = parameter(config.position_scale * table, None, "embed")
        # With the last but one layer's output, the last layer and the norm would be dead weight.
        used = config.layers + 1 + config.output_layer
        self.blocks = Stack(lambda r: VitBlock(config, r), used, rngs=rngs)
        self.norm = LayerNorm(config.width, config.norm_eps) if config.output_layer == -1 else None

    def __call__(
        self,
        frames_BFHWC: jax.Array,
        dtype: jnp.dtype,
        remat: Remat = KEEP_ALL,
        remat_calls: bool = False,
    ) -> jax.Array:
        """Encodes frames, `frames_per_call` on each device at a time.

        Args:
          frames_BFHWC: uint8 [B, F, image_size, image_size, 3]. Each device encodes what it holds:
            `parallel.frames.spread` gives all an equal share.
          dtype: of the computation and the result.
          remat: what the backward pass recomputes of each layer.
          remat_calls: the backward pass runs each call forward again, and so holds the activations
            of one call at a time.

        Returns:
          Patch features [B, F, N, D_v], N = grid^2, row by row.
        """
        frames_MBHWC, restored = batches(frames_BFHWC, self.config.frames_per_call)
        if len(frames_MBHWC) == 1:
            return restored(self._encode(frames_MBHWC[0], dtype, remat)[None])
        graph, state = nnx.split(self)

        def encode(state, frames):
            return nnx.merge(graph, state)._encode(frames, dtype, remat)

        if remat_calls:
            encode = jax.checkpoint(encode, prevent_cse=False)
        return restored(jax.lax.map(lambda frames: encode(state, frames), frames_MBHWC))

    def _encode(self, frames_BHWC: jax.Array, dtype: jnp.dtype, remat: Remat) -> jax.Array:
        x_BND = self.patches(frames_BHWC, dtype)
        x_BND, _ = self.blocks.scan(lambda block, x, _: (block(x), None), x_BND, remat=remat)
        return x_BND if self.norm is None else self.norm(x_BND)

    def patches(self, frames_BHWC: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What the first layer takes: embedded patches and their positions, [B, N, D]."""
        B = frames_BHWC.shape[0]
        grid, patch = self.config.grid, self.config.patch_size
        side = grid * patch  # a remainder of pixels is not seen: 384 = 27 * 14 + 6
        x = reshape(frames_BHWC[:, :side, :side], B, grid, patch, grid, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = reshape(x, B, grid * grid, patch * patch * 3)
        x = self.patch(normalise(x).astype(dtype))
        positions = resize_positions(self.positions[...], grid)
        positions = shard(positions, None, None).astype(dtype)
        return x + positions


def normalise(pixels: jax.Array) -> jax.Array:
    """uint8 [0, 255] as float32 [-1, 1], the same bits on every platform, compiled or not.

    2x - 255 is exact and one product follows. XLA compiles x / 127.5 - 1, which is the same number,
    as a product with 1 / 127.5, with or without a fused addition: its last bits would differ.
    """
    return (2 * pixels.astype(jnp.float32) - 255) * np.float32(1 / 255)


def resize_positions(table: jax.Array, grid: int) -> jax.Array:
    """Position embeddings for another resolution, [side^2, D] -> [grid^2, D].

    Bicubic without antialiasing and with half-pixel centres, as PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`, which transformers uses for SigLIP.
    """
    side = math.isqrt(table.shape[0])
    if side == grid:
        return table
    weights = jnp.asarray(_bicubic(side, grid), table.dtype)
    square = table.reshape(side, side, -1)
    resized = jnp.einsum("ij,kl,jlD->ikD", weights, weights, square, precision="highest")
    return resized.reshape(grid * grid, -1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Interpolation matrix [new, old], Keys' kernel with a = -0.75, edges repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel(centre - j)
    return matrix
