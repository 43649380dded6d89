"""Static tables of sizes, chosen by measurement. No size is tuned while a program runs."""

# Positions in a chunk of the XLA scan. It saves one state per chunk and holds the states of one
# chunk while it runs backward.
XLA_CHUNK = {
    # Measured once, lowest of 5, on an earlier form of the steps: 8 to 32 within 4 % at L = 4096;
    # at B = 64, L = 128 8 was the best without gate and skip (81 ms, 16 and 32: 84), 16 with (94).
    "cpu": 16,
    "gpu": 64,  # not measured here; 64 and 256 were within 10 % on an H100 (kernels.md section 8)
    "tpu": 128,  # not measured
}


def default_chunk(platform: str) -> int:
    """The chunk of the XLA scan on a platform as `jax.default_backend()` names it."""
    return XLA_CHUNK.get(platform, XLA_CHUNK["gpu"])
