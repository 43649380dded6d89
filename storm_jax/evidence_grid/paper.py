"""The paper's own numbers (arXiv 2503.04130 v4) that the report stands beside.

Averages are over MVBench, MLVU dev, LongVideoBench val and VideoMME without subtitles; tables 3 and
7 give fewer benchmarks.
"""

# Tables 4 and 10: frames -> (without Mamba, with Mamba), averages as printed.
TABLE4 = {8: (62.0, 61.6), 32: (63.5, 64.2), 128: (64.3, 66.7)}

# Table 5, trained at 32 frames: (Mamba, temporal sampling, temporal pooling, spatial pooling) ->
# the four benchmarks.
TABLE5 = {
    (False, False, False, False): (69.5, 70.2, 55.9, 60.1),
    (True, False, False, False): (70.3, 71.1, 54.5, 62.4),
    (True, True, False, False): (70.1, 70.8, 54.8, 63.1),
    (True, False, True, False): (70.4, 71.0, 54.2, 61.2),
    (True, False, False, True): (68.9, 69.2, 56.0, 61.1),
    (True, True, True, False): (70.1, 71.0, 54.0, 60.8),
    (True, True, False, True): (68.9, 69.5, 56.3, 60.9),
    (True, False, True, True): (68.5, 68.2, 53.7, 60.2),
    (True, True, True, True): (67.2, 68.6, 55.3, 60.1),
}

# Table 11, 128 frames, temporal pooling, full data: (Mamba, temporal sampling) -> four benchmarks.
TABLE11 = {
    (False, False): (68.1, 69.9, 57.4, 61.7),
    (False, True): (67.8, 70.1, 57.7, 59.3),
    (True, False): (71.3, 72.5, 59.5, 63.4),
    (True, True): (70.6, 72.9, 60.1, 62.4),
}

# Table 3: (pooling, frames) -> LongVideoBench, VideoMME.
TABLE3 = {
    ("spatial", 32): (56.0, 61.1),
    ("spatial", 128): (55.9, 58.3),
    ("temporal", 32): (54.2, 61.2),
    ("temporal", 128): (59.5, 63.4),
}

# Table 7, temporal pooling: (encoder, frames) -> VideoMME.
TABLE7 = {
    ("none", 32): 58.9,
    ("none", 128): 61.7,
    ("forward", 32): 62.2,
    ("forward", 128): 62.5,
    ("bidirectional", 32): 61.2,
    ("bidirectional", 128): 63.4,
}

# Table 13, one A100: (frames, compression) -> overall, LLM, vision tower, projector; milliseconds.
TABLE13 = {
    (4, 1): (162.92, 103.80, 52.41, 6.71),
    (8, 1): (270.87, 174.61, 85.11, 11.15),
    (16, 1): (486.37, 321.73, 144.47, 20.17),
    (32, 1): (933.99, 623.41, 269.49, 41.09),
    (64, 1): (1910.0, 1310.0, 515.17, 82.41),
    (128, 1): (4270.0, 3090.0, 1020.0, 163.34),
    (256, 1): (10340.0, 7960.0, 2030.0, 348.22),
    (512, 1): (28620.0, 23710.0, 4090.0, 811.31),
    (32, 4): (486.97, 175.75, 269.96, 41.26),
    (64, 4): (920.10, 322.22, 515.82, 82.06),
    (128, 4): (1800.0, 622.29, 1010.0, 163.23),
    (256, 4): (3680.0, 1310.0, 2020.0, 348.52),
    (512, 4): (7950.0, 3080.0, 4060.0, 811.84),
    (64, 8): (772.18, 175.27, 514.59, 82.32),
    (128, 8): (1500.0, 322.73, 1020.0, 163.09),
    (256, 8): (3000.0, 622.56, 2030.0, 348.71),
    (512, 8): (6200.0, 1310.0, 4070.0, 815.08),
}


def average(values: tuple[float, ...]) -> float:
    """Of benchmarks, percent."""
    return sum(values) / len(values)
