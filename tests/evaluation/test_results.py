"""Files of an evaluation: parts of several processes, damage, other recipes."""

import json

import pytest

from storm_jax.evaluation.items import Item
from storm_jax.evaluation.recipe import differences, fingerprint_of_items
from storm_jax.evaluation.results import ResultError, Samples

RECIPE = {"frames": {"max_frames": 8, "fps": 0.0}, "checkpoint": {"path": "/a", "step": 3}}


def record(id_, error=""):
    return {"id": id_, "output": f"ä {id_}", "error": error}


def test_parts_become_one_file_in_order(tmp_path):
    first, second = Samples(tmp_path, RECIPE, 0), Samples(tmp_path, RECIPE, 1)
    first.append(record("c"))
    second.append(record("a"))
    assert first.merged("abc") is None
    second.append(record("b"))
    assert Samples(tmp_path, RECIPE, 2).answered.keys() == set("abc")
    with second.alone():
        assert second.merged("abc") == [record(x) for x in "abc"]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert lines == [json.dumps(record(x), ensure_ascii=False) for x in "abc"]
    assert not list(tmp_path.glob("samples-*"))
    with first.alone():  # which was as far at the same time
        assert first.merged("abc") == [record(x) for x in "abc"]


def test_going_on(tmp_path):
    samples = Samples(tmp_path, RECIPE)
    samples.append(record("a"))
    samples.append(record("b", error="corrupt"))
    with pytest.raises(ResultError, match="another process is writing it"):
        Samples(tmp_path, RECIPE)
    samples.close()
    with (tmp_path / "samples-00000.jsonl").open("ab") as file:
        file.write(b'{"id": "c", "out')
    samples = Samples(tmp_path, RECIPE)
    assert samples.answered == {"a": record("a"), "b": record("b", "corrupt")}
    samples.forget(["b"])
    assert samples.answered == {"a": record("a")}
    samples.append(record("b"))
    assert samples.merged("ab") == [record("a"), record("b")]


def test_damage_is_told(tmp_path):
    samples = Samples(tmp_path, RECIPE)
    samples.append(record("a"))
    samples.close()
    with (tmp_path / "samples-00000.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(ResultError, match=r"samples-00000.jsonl:2 is no answer"):
        Samples(tmp_path, RECIPE)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ResultError, match="holds answers, but no recipe.json"):
        Samples(tmp_path, RECIPE)


def test_another_recipe_is_refused(tmp_path):
    Samples(tmp_path, RECIPE).close()
    moved = RECIPE | {"checkpoint": {"path": "/b", "step": 3}}
    Samples(tmp_path, moved).close()  # paths change no answer
    other = {**RECIPE, "frames": {"max_frames": 16}, "dtype": "bfloat16"}
    with pytest.raises(ResultError) as caught:
        Samples(tmp_path, other)
    assert str(caught.value).splitlines()[1:] == [
        '  dtype: none there, "bfloat16" asked for',
        "  frames.fps: 0.0 there, none asked for",
        "  frames.max_frames: 8 there, 16 asked for",
    ]
    assert differences(RECIPE, RECIPE) == []


def test_annotations_have_a_fingerprint_wherever_they_lie():
    item = Item("1", "/a/v.mp4", "What?", ("x", "y"), 0, categories={"k": ("p", "q")})
    same = Item("1", "/b/v.mp4", "What?", ("x", "y"), 0, categories={"k": ("p", "q")})
    other = Item("1", "/a/v.mp4", "What?", ("x", "y"), 1, categories={"k": ("p", "q")})
    prints = [fingerprint_of_items([i]) for i in (item, same, other)]
    assert prints[0] == prints[1] != prints[2]
