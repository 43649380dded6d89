"""The implementations that a run compares: the package's, a user's, and peers'."""

import dataclasses
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable

import jax

from storm_kernels.ablation import peers
from storm_kernels.ablation.operands import Operands, Scan, Setting
from storm_kernels.ablation.shapes import Shape
from storm_kernels.selective_scan import IMPLEMENTATIONS, dispatch, selective_scan
from storm_kernels.selective_scan.checks import checked_call

_PLATFORM = {"pallas_tpu": "tpu", "triton_gpu": "gpu"}
_PLATFORM_NAME = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row's implementation.

    Attributes:
        name: what the table calls it.
        scan: the function, None for one of another framework.
        missing: why it cannot run here at all, None if it can.
        broken: that reason is a mistake in it rather than something that this machine lacks.
        unsupported: of a shape and a setting, why it does not serve them, None if it does.
        layout: the only layout that it takes without copying; None takes the setting's.
        torch: made in PyTorch: see `peers.TorchProgram`.
        source: `path/to/file.py:function` of a user's.
    """

    name: str
    scan: Scan | None
    missing: str | None = None
    broken: bool = False
    unsupported: Callable[[Shape, Setting], str | None] = lambda shape, setting: None
    layout: str | None = None
    torch: bool = False
    source: str | None = None


def every(platform: str) -> list[Implementation]:
    """All that could be compared; `missing` says which cannot run on `platform`."""
    return [own(name, platform) for name in IMPLEMENTATIONS] + [
        peer(name, platform) for name in peers.NAMES
    ]


def chosen(text: str, platform: str) -> Implementation:
    """The implementation of a name, or of `path/to/file.py:function`.

    Raises:
        ValueError: there is none; the message names the choices.
    """
    if text in IMPLEMENTATIONS:
        return own(text, platform)
    if text in peers.NAMES:
        return peer(text, platform)
    if ":" in text or text.endswith(".py"):
        return from_file(text)
    raise ValueError(
        f"{text!r} is no implementation; there are {', '.join(IMPLEMENTATIONS)}, "
        f"{', '.join(peers.NAMES)}, and path/to/file.py:function for one of your own"
    )


def own(name: str, platform: str) -> Implementation:
    """One of the package's."""

    def scan(case: Operands, setting: Setting):
        return selective_scan(
            **case,  # pyrefly: ignore[bad-argument-type]
            delta_softplus=setting.softplus,
            reverse=setting.reverse,
            return_final_state=setting.final_state,
            layout=setting.layout,  # pyrefly: ignore[bad-argument-type]
            implementation=name,  # pyrefly: ignore[bad-argument-type]
        )

    needed = _PLATFORM.get(name, platform)
    missing = None
    if importlib.util.find_spec(f"storm_kernels.selective_scan.{name}") is None:
        missing = "it is not part of this version"
    elif needed != platform:
        missing = f"needs {_PLATFORM_NAME[needed]}, and this is a {platform.upper()}"
        if needed == "tpu":
            missing += "; --platform=tpu:v5e gives its static cost"
    else:
        try:
            dispatch.load(name)
        except ImportError as error:
            missing = f"cannot be imported: {error}"
    return Implementation(name, scan, missing)


def why_unsupported(name: str, case: Operands, setting: Setting) -> str | None:
    """Why one of the package's implementations does not serve these operands, None if it does."""
    reasons = []

    def ask(case):
        operands = {"D": None, "z": None, "delta_bias": None, "initial_state": None}
        call = checked_call(
            **(operands | {"segment_ids": None} | case),
            delta_softplus=setting.softplus,
            reverse=setting.reverse,
            layout=setting.layout,
            chunk_size=None,
            output_dtype=None,
        )
        reasons.append(dispatch.load(name).unsupported(call))

    jax.eval_shape(ask, case)
    return reasons[0]


def peer(name: str, platform: str) -> Implementation:
    """One of another project's, if it is installed."""
    missing = peers.missing(name, platform)
    if name == "ejkernel":
        return Implementation(
            name,
            peers.ejkernel_scan,
            missing,
            unsupported=peers.ejkernel_unsupported,
            layout="bld",
        )
    return Implementation(
        name, None, missing, unsupported=peers.mamba_ssm_unsupported, layout="bdl", torch=True
    )


def from_file(text: str) -> Implementation:
    """A user's function from `path/to/file.py:function`.

    It has the public signature of `selective_scan`, without the parameters that it does not
    support: it is not asked to run a case that needs one of those. The file's own folder can be
    imported from, as when Python runs the file. If the file raises while it is imported, that is
    what the implementation has to say at every case.

    Raises:
        ValueError: there is no such file, or no such function in it.
    """
    path_text, _, name = text.rpartition(":")
    path = pathlib.Path(path_text)
    if not path_text or not name or path.suffix != ".py":
        raise ValueError(f"{text!r} is no implementation; expected path/to/file.py:function")
    if not path.is_file():
        raise ValueError(f"{text!r} is no implementation: there is no file {path}")
    label = f"{path.name}:{name}"
    module_name = f"_ablated_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses of the file look themselves up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error} (while {path} was imported)"
        return Implementation(label, None, reason, broken=True, source=text)
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, x in vars(module).items() if inspect.isfunction(x) and n[0] != "_"]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(there) or 'none'}")
    return dataclasses.replace(_of_user(label, function), source=text)


def _of_user(label: str, function: Callable) -> Implementation:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def keywords(case: Operands, setting: Setting) -> dict[str, object]:
        """The keyword arguments of a call, and whether each differs from its absence."""
        return {
            "z": case.get("z"),
            "delta_bias": case.get("delta_bias"),
            "delta_softplus": setting.softplus,
            "initial_state": case.get("initial_state"),
            "segment_ids": case.get("segment_ids"),
            "reverse": setting.reverse,
            "return_final_state": setting.final_state,
            "layout": setting.layout,
        }

    def absent(value: object) -> bool:
        return value is None or value is False or (isinstance(value, str) and value == "bld")

    def scan(case: Operands, setting: Setting):
        given = keywords(case, setting)
        if not takes_all:
            unknown = [n for n, x in given.items() if n not in parameters and not absent(x)]
            if unknown:
                raise TypeError(f"{label} has no parameter {', '.join(unknown)}")
            given = {n: x for n, x in given.items() if n in parameters}
        first = (case[name] for name in ("u", "delta", "A", "B", "C"))
        return function(*first, case.get("D"), **given)

    return Implementation(label, scan)
