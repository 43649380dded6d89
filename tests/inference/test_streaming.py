"""A stream against the same frames given at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import VISUAL, ConfigError, MeshConfig
from storm_jax.inference.engine import Engine
from storm_jax.inference.load import LoadedModel
from storm_jax.inference.prefill import Visual
from storm_jax.inference.sampling import Sampling
from storm_jax.inference.streaming import Stream
from tests.inference.tiny_streams import loaded, parameters, video


class Offline:
    """All frames at once, through the program that training runs."""

    def __init__(self, model: LoadedModel, most: int):
        """`most` frames at most: fewer are padded, so that one program serves all."""
        self._model, self._most = model, most
        config = model.config.model
        groups = config.reduction.groups(most)
        temporal = config.temporal
        self._params = parameters(temporal.direction, temporal.layers, config.dtype)

        @jax.jit
        def encode(params, frames, segments, frame_groups):
            storm = model.model.bind(params)
            return storm.encode(frames[None], segments[None], frame_groups[None], groups)

        self._encode = encode

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """[T, N, D]."""
        config, count = self._model.config.model, len(frames)

        def padded(x, value):
            return np.pad(
                x,
                ((0, self._most - count), *[(0, 0)] * (x.ndim - 1)),
                constant_values=value,
            )

        segments = padded(np.zeros(count, np.int32), -1)
        groups = padded(config.reduction.frame_groups(count), -1)
        with jax.set_mesh(self._model.mesh):
            tokens = self._encode(self._params, padded(frames, 0), segments, groups)
        tokens = np.asarray(tokens)[0].reshape(-1, config.group_tokens, config.decoder.width)
        return tokens[: config.reduction.groups(count)]


def assert_same(stream: Stream, expected_TND: np.ndarray, relative=1e-5) -> None:
    visual = stream.visual()
    config = stream._loaded.config.model
    assert visual.frames == stream.frames
    assert visual.mixed == stream.frames * config.frame_tokens
    assert visual.count == len(stream.groups) * config.group_tokens
    assert len(visual.tokens) == stream.capacity * config.group_tokens
    got = np.asarray(visual.tokens, np.float32)[: visual.count]
    expected = expected_TND[stream.groups].reshape(visual.count, -1).astype(np.float32)
    atol = relative * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


def pushed(stream, frames, rng, at_most=7):
    """In pieces of random length."""
    while len(frames):
        n = rng.integers(1, at_most + 1)
        stream.push(frames[:n])
        frames = frames[n:]


POOLED = {"temporal_pool": 4, "spatial_pool": 2}
CASES = {
    "plain": {"temporal_pool": 1},
    "pooled": POOLED,
    "sampled": {"temporal_pool": 3, "temporal_sampling": 2},
    "no temporal encoder": {"layers": 0},
}


@pytest.mark.parametrize("case,batch", [("pooled", 1), *((case, 6) for case in CASES)])
def test_equal_to_offline_while_the_budget_lasts(case, batch):
    model, rng = loaded(**CASES[case]), np.random.default_rng(batch)
    frames = video(26)
    group_tokens = model.config.model.group_tokens
    stream = Stream(model, budget=26 * group_tokens, batch=batch)
    offline, done = Offline(model, len(frames)), 0
    # Questions in mid-batch and in mid-group change nothing for those that follow.
    for until in (1, 5, 6, 13, 26):
        pushed(stream, frames[done:until], rng)
        done = until
        expected = offline(frames[:until])
        assert_same(stream, expected)
        assert stream.groups == list(range(len(expected)))


@pytest.mark.parametrize("policy", ["recent", "spread"])
@pytest.mark.parametrize("capacity", [2, 5])
def test_beyond_the_budget_the_kept_groups_are_those_of_offline(policy, capacity):
    model, rng = loaded(temporal_pool=2, temporal_sampling=2), np.random.default_rng(capacity)
    frames = video(61)
    offline = Offline(model, len(frames))
    # A batch of 16 frames brings more groups than there are slots.
    stream = Stream(model, budget=capacity * 4 + 3, policy=policy, batch=16)
    assert stream.capacity == capacity
    for until, more in zip((9, 40, 61), (9, 31, 21), strict=True):
        pushed(stream, frames[until - more : until], rng)
        expected = offline(frames[:until])
        assert_same(stream, expected)
        count = len(expected)
        if policy == "recent":
            assert stream.groups == list(range(max(0, count - capacity), count))
        else:
            stride = np.diff(stream.groups)
            assert stream.groups[0] == 0 and len(set(stride)) <= 1
    assert len(stream.groups) <= capacity


def test_bfloat16():
    model = loaded(dtype="bfloat16")
    frames = video(24)
    stream = Stream(model, budget=12 * 4, batch=4)
    stream.push(frames)
    assert stream.visual().tokens.dtype == jnp.bfloat16
    assert_same(stream, Offline(model, 24)(frames).astype(np.float32), relative=2e-2)


def test_on_several_devices():
    frames = video(21)
    one = loaded(**POOLED)
    several = loaded(MeshConfig(data=1, fsdp=2, tensor=2, seq=2), 8, **POOLED)
    stream = Stream(several, budget=6 * 1, batch=4)
    stream.push(frames)
    offline = Offline(one, 51)
    assert_same(stream, offline(frames))
    stream.push(video(30, seed=1))
    assert_same(stream, offline(np.concatenate([frames, video(30, seed=1)])))
    assert stream._step._cache_size() == 1  # the state comes back as it went in


def test_no_frame_yet():
    stream = Stream(loaded(), budget=40)
    visual = stream.visual()
    assert (visual.count, visual.frames, stream.groups) == (0, 0, [])


def test_an_earlier_answer_keeps_its_tokens():
    """What was taken for a question is a copy: the stream goes on while it is answered."""
    model = loaded()
    stream = Stream(model, budget=8, batch=2)
    stream.push(video(4))
    before = stream.visual()
    first = np.asarray(before.tokens).copy()
    stream.push(video(10, seed=5))
    stream.wait()
    np.testing.assert_array_equal(before.tokens, first)
    assert np.abs(np.asarray(stream.visual().tokens) - first).max() > 1e-2


def test_one_program_and_a_fixed_number_of_arrays():
    model, rng = loaded(), np.random.default_rng(0)
    stream = Stream(model, budget=20, policy="spread", batch=4)

    def round_of(frames):
        pushed(stream, video(frames, seed=frames), rng)
        stream.visual()
        stream.wait()
        return sum(x.nbytes for x in jax.live_arrays())

    after_first = round_of(10)
    assert [round_of(n) for n in (3, 17, 50, 111)] == [after_first] * 4
    assert stream._step._cache_size() == 1 and stream._gather._cache_size() == 1


def test_warming_up_changes_nothing():
    model, frames = loaded(**POOLED), video(13)
    stream = Stream(model, budget=3, batch=4)
    stream.warm_up()
    stream.push(frames[:6])
    stream.visual()
    stream.warm_up()  # in mid-group
    stream.push(frames[6:])
    assert_same(stream, Offline(model, 13)(frames))
    assert stream._step._cache_size() == 1 and stream._gather._cache_size() == 1


def test_refusals():
    with pytest.raises(ConfigError, match="direction='bidirectional'"):
        Stream(loaded(direction="bidirectional"), budget=40)
    with pytest.raises(ConfigError, match="budget=3.*4 of one"):
        Stream(loaded(), budget=3)
    with pytest.raises(ConfigError, match="batch=0"):
        Stream(loaded(), budget=40, batch=0)
    stream = Stream(loaded(), budget=40)
    with pytest.raises(ValueError, match=r"float32 \(1, 12, 12, 3\)"):
        stream.push(np.zeros((1, 12, 12, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(1, 9, 12, 3\), expected uint8 \[F, 12, 12, 3\]"):
        stream.push(np.zeros((1, 9, 12, 3), np.uint8))


# ----------------------------------------------------------------------------------------- answers


def answer(engine: Engine, visual) -> list[int]:
    tokens = np.array([2, 7, *[VISUAL] * visual.count, 11, 12, 13], np.int32)
    slot = engine.admit(tokens, [visual], Sampling(max_new_tokens=12))
    ids = []
    while progress := engine.step():
        ids += progress[0].tokens
    engine.release(slot)
    return ids


def test_the_same_greedy_answers_as_offline():
    model, frames = loaded(temporal_pool=2), video(24)
    engine = Engine(model, slots=1, context=96)
    stream = Stream(model, budget=12 * 4, batch=5)
    answers = []
    for until, more in ((5, 5), (14, 9), (24, 10)):
        stream.push(frames[until - more : until])
        answers.append(answer(engine, stream.visual()))
        assert answers[-1] == answer(engine, engine.encode(frames[:until]))
    assert len({tuple(ids) for ids in answers}) > 1  # frames have a say
    # Beyond the budget: as offline with the tokens of the kept groups alone.
    stream.push(video(9, seed=1))
    visual = stream.visual()
    tokens = engine.encode(np.concatenate([frames, video(9, seed=1)])).tokens
    kept = tokens[: 17 * 4].reshape(17, 4, -1)[np.array(stream.groups)].reshape(12 * 4, -1)
    assert stream.groups == list(range(5, 17))
    assert answer(engine, visual) == answer(engine, Visual(kept, 12 * 4, 33, 33 * 4))
