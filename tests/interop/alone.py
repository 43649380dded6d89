"""Runs before the code of `exported.in_twin`: a process in which storm_jax does not exist."""

import importlib.abc
import sys


class Missing(importlib.abc.MetaPathFinder):
    """Whoever imports these packages is told that they are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("storm_jax", "storm_kernels", "configs", "jax", "flax"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
try:
    import storm_jax  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    sys.exit("storm_jax is there")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are too small to share out


def load(folder, auto="AutoModelForImageTextToText", **options):
    """The model, and that every tensor was found and every one used."""
    auto = getattr(transformers, auto)
    model, info = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def arrays(file):
    """Arrays of an .npz as tensors."""
    return {name: torch.from_numpy(array) for name, array in np.load(file).items()}
