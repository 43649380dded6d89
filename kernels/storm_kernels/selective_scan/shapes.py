"""Static tables of sizes, chosen by measurement. No size is tuned while a program runs."""

# Positions in a chunk of the XLA scan. It saves one state per chunk and holds the states of one
# chunk while it runs backward.
XLA_CHUNK = {
    # Measured once, lowest of 5, on an earlier form of the steps: 8 to 32 within 4 % at L = 4096;
    # at B = 64, L = 128 8 was the best without gate and skip (81 ms, 16 and 32: 84), 16 with (94).
    "cpu": 16,
    # H100, bf16, forward and backward (benchmarks/results/scan_gpu.json): at L = 65536, E = 2304
    # 190 ms against 225 (128), 228 (64); at L = 32768, E = 7168 all of 32 to 256 within 7 %.
    "gpu": 256,
    # Not run. The compiler's own estimates for one v5e (libtpu 0.0.42.1), forward, bf16, L = 8192,
    # E = 2304, in millions of cycles: 58 (16), 52 (32), 49 (64), 48 (128), 55 (256), 59 (512).
    "tpu": 128,
}


def default_chunk(platform: str) -> int:
    """The chunk of the XLA scan on a platform as `platform_of` names it."""
    return XLA_CHUNK.get(platform, XLA_CHUNK["gpu"])
