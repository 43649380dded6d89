"""Calls an exported processor in a process where this project cannot be imported.

python processor_calls.py CALLS RESULTS

CALLS is a pickle of {name: (folder, method, positional arguments, keyword arguments)}; RESULTS
becomes one of {name: what was returned, an output as {name: (its type, array)}, or the name and
text of an exception}.
"""

import pickle
import sys

BLOCKED = ("storm_jax", "storm_kernels", "jax")


class Block:
    """An import hook that knows nothing of this project, although it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


def plain(value):
    """Name of the type, and the value as an array where it is a tensor."""
    kind = type(value).__name__
    return kind, value.numpy() if kind == "Tensor" else value


def main():
    sys.meta_path.insert(0, Block())
    from transformers import AutoProcessor, BatchFeature

    calls, results = sys.argv[1:]
    with open(calls, "rb") as file:
        calls = pickle.load(file)
    processors, out = {}, {}
    for name, (folder, method, arguments, options) in calls.items():
        if folder not in processors:
            processors[folder] = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        try:
            result = getattr(processors[folder], method)(*arguments, **options)
        except Exception as error:
            result = type(error).__name__, str(error)
        if isinstance(result, BatchFeature):
            result = {name: plain(value) for name, value in result.items()}
        out[name] = result
    assert not [name for name in sys.modules if name.split(".")[0] in BLOCKED]
    with open(results, "wb") as file:
        pickle.dump(out, file)


if __name__ == "__main__":
    main()
