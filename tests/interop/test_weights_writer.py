"""Files of safetensors written tensor by tensor, as safetensors itself reads them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from storm_jax.interop.files import INDEX, Weights, WeightsWriter

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(15).reshape(3, 5).astype(ml_dtypes.bfloat16),
    "c": np.ones((40,), np.float32),  # larger than a file may be
    "d": np.float32(3).reshape(()),
    "e": np.arange(12, dtype=np.float16).reshape(3, 4).T,  # not contiguous
}


def write(folder, limit):
    announced = {name: (x.shape, x.dtype) for name, x in TENSORS.items()}
    writer = WeightsWriter(folder, announced, limit)
    for name, x in TENSORS.items():
        writer.write(name, x)
    return writer.finish()


@pytest.mark.parametrize(("limit", "files"), [(1000, 1), (100, 3), (30, 4)])
def test_what_is_written_is_read(limit, files, tmp_path):
    assert write(tmp_path, limit) == files
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    found = {}
    for path in paths:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
        found |= tensors
    assert set(found) == set(TENSORS)
    weights = Weights(tmp_path)
    for name, x in TENSORS.items():
        for got in (found[name], weights.tensor(name)):
            assert got.dtype == x.dtype
            np.testing.assert_array_equal(got, x)
    assert (tmp_path / INDEX).is_file() == (files > 1)
    if files > 1:
        total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(x.nbytes for x in TENSORS.values())


def test_order_and_completeness_are_held(tmp_path):
    announced = {name: (x.shape, x.dtype) for name, x in TENSORS.items()}
    with pytest.raises(AssertionError, match="c"):
        WeightsWriter(tmp_path, announced, 1000).write("c", TENSORS["c"])
    writer = WeightsWriter(tmp_path, announced, 1000)
    with pytest.raises(AssertionError):
        writer.write("a", TENSORS["a"].T)
    writer = WeightsWriter(tmp_path, announced, 1000)
    writer.write("a", TENSORS["a"])
    with pytest.raises(AssertionError, match="not every tensor"):
        writer.finish()
