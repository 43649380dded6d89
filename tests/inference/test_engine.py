"""Answers of the engine against the whole model applied to the whole sequence again and again.

`StormModel.apply`, which training uses and which is compared with transformers elsewhere, has no
cache, no ring and no loop.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.config import VISUAL, MeshConfig
from storm_jax.inference.engine import STEPS, ContextError, Engine
from storm_jax.inference.load import made_ready
from storm_jax.inference.sampling import Sampling
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.tiny import run_config, tiny_model

CONTEXT = 96
FAMILIES = {
    # Rings of 6 slots, norms of queries and keys, tied embeddings.
    "gemma3": {},
    # Soft caps, and a window in every second layer.
    "gemma2": dict(qk_norm=False, attention_softcap=4.0, logit_softcap=3.0, query_scale=0.4),
    # Biases, SwiGLU, a head of its own, all layers global.
    "qwen2": dict(
        qk_norm=False,
        qkv_bias=True,
        activation="silu",
        norm_plus_one=False,
        post_norms=False,
        global_every=1,
        window=0,
        tied_embeddings=False,
        scale_embeddings=False,
    ),
}


def perturbed(params):
    """Every parameter away from its initial value, so that none can be forgotten.

    With tied embeddings layers must add much, or an answer would repeat its first token.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))

    def moved(path, x, key):
        x = x + 0.3 * jax.random.normal(key, x.shape)
        return x + 4 if "post_norm" in jax.tree_util.keystr(path) else x

    others = [moved(path, x, key) for (path, x), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, others)


class Case:
    """A model, an engine, and what the model says without a cache."""

    def __init__(self, family: str, slots: int = 3, devices: int = 1, **parts):
        self.config = tiny_model(decoder=FAMILIES[family], **parts)
        self.run = dataclasses.replace(run_config(), model=self.config)
        self.model = StormModel(self.config)
        mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
        params = perturbed(self.model.init(jax.random.key(0)))
        self.params = jax.tree.map(jnp.copy, params)
        loaded = made_ready(self.run, params, mesh)
        self.engine = Engine(loaded, slots=slots, context=CONTEXT)
        self._apply = jax.jit(self.model.apply)

    def prompt(self, seed: int, frames: int, words: int):
        """Tokens, frames of each medium, and their encoding."""
        rng = np.random.default_rng(seed)
        side = self.config.vit.image_size
        video = rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        tokens = rng.integers(0, self.config.decoder.vocab_size, words).astype(np.int32)
        if not frames:
            return tokens, [], []
        visual = np.full(self.config.visual_tokens(frames), VISUAL, np.int32)
        tokens = np.concatenate([tokens[:2], visual, tokens[2:]])
        return tokens, [video], [self.engine.encode(video)]

    def scores(self, tokens, videos) -> np.ndarray:
        """Behind every token of a sequence, without a cache."""
        n = len(tokens)
        room = -(-n // 32) * 32
        frames = [np.zeros((0, *[self.config.vit.image_size] * 2, 3), np.uint8), *videos]
        segments = np.concatenate([np.full(len(v), i) for i, v in enumerate(frames)])
        groups, used = [np.zeros(0, int)], 0
        for video in videos:
            groups.append(self.config.reduction.frame_groups(len(video)) + used)
            used = groups[-1].max() + 1
        batch = {
            "frames": np.concatenate(frames)[None],
            "frame_segments": segments[None].astype(np.int32),
            "frame_groups": np.concatenate(groups)[None].astype(np.int32),
            "tokens": np.pad(tokens, (0, room - n))[None],
            "segments": np.where(np.arange(room) < n, 0, -1)[None].astype(np.int32),
            "positions": np.arange(room, dtype=np.int32)[None],
        }
        return np.asarray(self._apply(self.params, batch)[0, :n])

    def greedy(self, tokens, videos, new: int) -> list[int]:
        """The tokens that follow, each from the whole sequence."""
        made: list[int] = []
        for _ in range(new):
            sequence = np.concatenate([tokens, np.asarray(made, np.int32)]).astype(np.int32)
            made.append(int(self.scores(sequence, videos)[-1].argmax()))
        return made

    def answer(self, slot: int) -> tuple[list[int], str]:
        """Everything that one slot gives while others may run too."""
        made: list[int] = []
        while True:
            for progress in self.engine.step():
                if progress.slot == slot:
                    made += progress.tokens
                    if progress.finish:
                        return made, progress.finish


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return Case(request.param)


def test_answers_to_a_video(case):
    tokens, videos, media = case.prompt(1, 5, 9)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=21))
    expected = case.greedy(tokens, videos, 21)
    assert case.answer(slot) == (expected, "length")
    assert len(set(expected)) > 2
    case.engine.release(slot)
    assert case.engine.free_slots == 3


def test_requests_that_come_and_go(case):
    """Rows of different lengths; one ends, another takes its place while the rest goes on."""
    engine = case.engine
    prompts = [case.prompt(10 + i, *sizes) for i, sizes in enumerate([(0, 3), (6, 17), (1, 8)])]
    news = (5, 30, 24)
    slots = [
        engine.admit(tokens, media, Sampling(max_new_tokens=new))
        for (tokens, _, media), new in zip(prompts, news, strict=True)
    ]
    assert engine.free_slots == 0
    with pytest.raises(RuntimeError, match="slots are taken"):
        engine.admit(prompts[0][0], [], Sampling())
    made: dict[int, list[int]] = {slot: [] for slot in slots}
    late = None
    while progress := engine.step():
        for one in progress:
            made[one.slot] += one.tokens
            if one.finish and late is None:
                assert one.slot == slots[0]
                engine.release(one.slot)
                prompts.append(case.prompt(20, 3, 6))
                late = engine.admit(prompts[-1][0], prompts[-1][2], Sampling(max_new_tokens=12))
                first, made[late] = made[slots[0]], []
    answers = [first, made[slots[1]], made[slots[2]], made[late]]
    assert list(map(len, answers)) == [5, 30, 24, 12]
    for (tokens, videos, _), answer in zip(prompts, answers, strict=True):
        assert answer == case.greedy(tokens, videos, len(answer))
    for slot in (late, *slots[1:]):
        engine.release(slot)


@pytest.mark.parametrize("ending", ["length", "stop", "cut off"])
def test_a_conversation_goes_on(case, ending):
    """A second turn with a second video, behind answers that ended in every way."""
    tokens, videos, media = case.prompt(3, 4, 7)
    plain = case.greedy(tokens, videos, 12)
    stops = (plain[6],) if ending == "stop" else ()
    expected = plain[: plain.index(plain[6])] if ending == "stop" else plain
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=12, stop_tokens=stops))
    if ending == "cut off":
        made = case.engine.step()[0].tokens
    else:
        made, finish = case.answer(slot)
        assert (made, finish) == (expected, ending)
    further, more_videos, more_media = case.prompt(4, 2, 11)
    case.engine.extend(slot, further, more_media, Sampling(max_new_tokens=9))
    whole = np.concatenate([tokens, np.asarray(made, np.int32), further])
    assert case.answer(slot) == (case.greedy(whole, videos + more_videos, 9), "length")
    case.engine.release(slot)


def test_extending_in_pieces(case, monkeypatch):
    monkeypatch.setattr("storm_jax.inference.engine._PIECE", 8)
    tokens, _, _ = case.prompt(5, 0, 3)
    slot = case.engine.admit(tokens, [], Sampling(max_new_tokens=2))
    made, _ = case.answer(slot)
    further, videos, media = case.prompt(6, 5, 13)
    case.engine.extend(slot, further, media, Sampling(max_new_tokens=10))
    whole = np.concatenate([tokens, np.asarray(made, np.int32), further])
    assert case.answer(slot)[0] == case.greedy(whole, videos, 10)
    case.engine.release(slot)


def test_a_stop_token_at_once(case):
    tokens, videos, media = case.prompt(8, 2, 5)
    first = case.greedy(tokens, videos, 1)[0]
    slot = case.engine.admit(tokens, media, Sampling(stop_tokens=(first,)))
    assert case.answer(slot) == ([], "stop")
    case.engine.release(slot)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=1))
    assert case.answer(slot) == ([first], "length")
    case.engine.release(slot)


def test_released_in_the_middle(case):
    tokens, videos, media = case.prompt(9, 3, 5)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=60))
    case.engine.step()
    case.engine.release(slot)
    assert case.engine.step() == []
    again = case.engine.admit(tokens, media, Sampling(max_new_tokens=10))
    assert again == slot and case.answer(again)[0] == case.greedy(tokens, videos, 10)
    case.engine.release(again)


def test_the_context_ends_an_answer(case):
    tokens, videos, media = case.prompt(11, 2, CONTEXT - 12)
    room = CONTEXT - len(tokens)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=500))
    made, finish = case.answer(slot)
    assert finish == "length" and len(made) == room
    assert made == case.greedy(tokens, videos, room)
    case.engine.release(slot)


def test_too_long_a_prompt(case):
    tokens, _, media = case.prompt(12, 2, CONTEXT)
    with pytest.raises(ContextError) as error:
        case.engine.admit(tokens, media, Sampling())
    assert error.value.needed == len(tokens) + 1 and error.value.available == CONTEXT
    assert case.engine.free_slots == 3
    with pytest.raises(ValueError, match="VISUAL tokens, but the media have"):
        case.engine.admit(tokens[:40], [], Sampling())


def test_penalty_and_seeds(case):
    """Random choices depend on the request alone, not on its row or on what runs beside it."""
    tokens, _, media = case.prompt(13, 2, 6)
    wish = Sampling(max_new_tokens=16, temperature=1.3, top_k=20, top_p=0.95, seed=5)
    slot = case.engine.admit(tokens, media, wish)
    alone = case.answer(slot)[0]
    case.engine.release(slot)
    other = case.engine.admit(case.prompt(14, 0, 4)[0], [], Sampling(max_new_tokens=40))
    slot = case.engine.admit(tokens, media, wish)
    assert slot != other and case.answer(slot)[0] == alone
    case.engine.release(slot)
    slot = case.engine.admit(tokens, media, dataclasses.replace(wish, seed=6))
    assert case.answer(slot)[0] != alone
    case.engine.release(slot)
    case.engine.release(other)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=16, repetition_penalty=1e6))
    made = case.answer(slot)[0]
    assert len(set(made)) == len(made) and not set(made) & set(tokens.tolist())
    case.engine.release(slot)


@pytest.mark.parametrize("devices", [2])
def test_split_over_devices(devices):
    """Two key-value heads and the vocabulary on two devices."""
    if jax.device_count() < devices:
        pytest.skip("needs several devices")
    case = Case("gemma3", devices=devices)
    tokens, videos, media = case.prompt(1, 5, 9)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=12))
    assert case.answer(slot)[0] == case.greedy(tokens, videos, 12)
    out = case.engine.loaded.weights.layers[0].out
    assert out.addressable_shards[0].data.shape[1] == out.shape[1] // 2


def test_more_devices_than_heads():
    """Four devices, two key-value heads: attention is whole on each, the MLP is split."""
    case = Case("qwen2", devices=4)
    tokens, videos, media = case.prompt(1, 3, 9)
    slot = case.engine.admit(tokens, media, Sampling(max_new_tokens=8))
    assert case.answer(slot)[0] == case.greedy(tokens, videos, 8)


def test_values_out_of_range():
    for name, value in [
        ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("min_p", 2.0), ("seed", -1),
        ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("stop_tokens", tuple(range(9))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Sampling(**{name: value})


@pytest.mark.parametrize(
    ("direction", "per_call"), [("forward", 16), ("bidirectional", 16), ("forward", 40)]
)
def test_encoding_in_batches(direction, per_call):
    """Any number of frames, cut in any way, against the whole video at once."""
    vit = dict(frames_per_call=per_call)
    case = Case("qwen2", temporal=dict(direction=direction), vit=vit)
    encode = case.engine.encode
    side = case.config.vit.image_size
    video = np.random.default_rng(0).integers(0, 256, (37, side, side, 3), dtype=np.uint8)

    @jax.jit
    def whole(params, frames):
        storm = case.model.bind(params)
        groups = case.config.reduction.frame_groups(len(frames))
        segments = jnp.zeros((1, len(frames)), jnp.int32)
        return storm.encode(frames[None], segments, groups[None], int(groups.max()) + 1)[0]

    for count, cuts in [
        (37, [37]), (37, [5, 1, 20, 11]), (27, [27]), (16, [16]), (3, [2, 1]), (1, [1]),
    ]:  # fmt: skip
        chunks = np.split(video[:count], np.cumsum(cuts)[:-1])
        got = encode(iter(chunks))
        expected = np.asarray(whole(case.params, video[:count]))
        assert (got.count, got.frames) == (len(expected), count)
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(got.tokens[: got.count], expected, atol=bound, rtol=0)


def test_lengths_that_share_a_program():
    """Videos of other lengths compile nothing new once their bucket is known."""
    case = Case("qwen2", vit=dict(frames_per_call=16))
    side = case.config.vit.image_size
    video = np.zeros((64, side, side, 3), np.uint8)
    for count in (64, 49, 33, 9, 1):
        case.engine.encode(video[:count])
    programs = case.engine.programs

    def large():
        """All but those that copy a batch to its place, of which each length has its own."""
        return [name for name, _ in programs._made if name != "joining batches"]

    known = large()
    for count in (63, 61, 50, 58):
        case.engine.encode(video[:count])
        assert case.engine.can_encode(count)
    assert large() == known


def test_a_call_has_as_many_steps_as_its_pace_allows():
    case = Case("qwen2", slots=1)
    case.engine.admit(case.prompt(0, 0, 6)[0], [], Sampling(max_new_tokens=80))
    assert [len(p.tokens) for p in case.engine.step()] == [1]
    case.engine._pace = 1.0  # seconds
    assert [len(p.tokens) for p in case.engine.step()] == [8]
    assert case.engine._pace < 1.0
    case.engine._pace = 1e-6
    assert [len(p.tokens) for p in case.engine.step()] == [STEPS]
    case.engine._pace = 0.06 / 20
    assert [len(p.tokens) for p in case.engine.step()] == [20]
