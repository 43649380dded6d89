"""`--config.init_from`: a checkpoint for all parts, or a field of each."""

import pytest
from absl import flags
from ml_collections import config_flags

from storm_jax.config_arguments import spelled_out


def given(*arguments: str) -> dict[str, str]:
    """What ml_collections makes of the arguments of a shipped recipe."""
    values = flags.FlagValues()
    argv = spelled_out(["train", "--config=configs/sft.py:size=tiny", *arguments])
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return {k: v for k, v in config.value.init_from.items() if v}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--config.init_from=runs/a=1",), {"all": "runs/a=1"}),
        (("-config.init_from=runs/a",), {"all": "runs/a"}),
        (("--config.init_from", "runs/a", "--config.train.steps=2"), {"all": "runs/a"}),
        (("--config.init_from.all=runs/a",), {"all": "runs/a"}),
        (("--config.init_from.vit=v", "--config.init_from=a"), {"vit": "v", "all": "a"}),
        (("--config.init_from={'vit': 'v'}",), {"vit": "v"}),
        (("--config.init_from", "{'vit': 'v'}"), {"vit": "v"}),
        (("--config.init_from=",), {}),
        ((), {}),
    ],
)
def test_every_spelling(arguments, expected):
    assert given(*arguments) == expected


def test_other_arguments_stay():
    argv = ["train", "--config.init_from.vit=x", "--config.init_fromage=y", "config.init_from=z"]
    assert spelled_out(argv) == argv
    assert spelled_out(["--config.init_from"]) == ["--config.init_from.all"]
