"""The import directions of the design: a walk over every import statement of the packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Modules of storm_jax that nothing imports.
COMMANDS = {
    "compile",
    "convert",
    "evaluate",
    "evidence",
    "generate",
    "serve",
    "stream",
    "train",
}

# Package of storm_jax -> packages and modules of storm_jax that it may import besides itself.
MAY_IMPORT = {
    "frames": set(),
    "config": {"frames"},
    "parallel": {"config", "frames"},
    "models": {"config", "parallel"},
    "data": {"config", "frames"},
    "chips": set(),
    "answer_flags": {"inference"},
    "option_flags": {"inference"},
    "command_exit": set(),
    "config_arguments": set(),
    "cache_flag": {"training"},
    "disk": set(),
    "flops": {"chips", "config", "models"},
    "workdir": {"config", "parallel"},
    "metrics": {"workdir"},
    "reporting": {"config", "data", "flops", "metrics", "parallel", "training"},
    "training": {"config", "parallel", "models"},
    "checkpoint": {"config", "models", "training", "workdir"},
    "aot": {"chips", "config", "data", "flops", "models", "parallel", "training"},
    "inference": {"checkpoint", "config", "data", "frames", "models", "parallel", "training"},
    "interop": {"config", "data", "frames", "models"},
    "evaluation": {
        "checkpoint",
        "config",
        "data",
        "disk",
        "frames",
        "inference",
        "parallel",
        "workdir",
    },  # fmt: skip
    "serving": {"config", "data", "inference"},
    "evidence_grid": {"config", "data", "frames", "models", "training"},
}
# Files that an export carries: they stand alone there, side by side.
TWIN = ROOT / "storm_jax" / "interop" / "twin"

# Third-party packages that a package must not import.
FORBIDDEN = {
    "models": {"torch", "transformers", "av", "grain", "orbax"},
    "data": {"jax", "flax", "orbax"},
    "config": {"jax", "flax"},
    "frames": {"jax", "flax"},
    "storm_kernels": {"storm_jax", "flax", "torch"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            beside = path.parent == TWIN and node.level == 1 and "." not in str(node.module)
            assert node.level == 0 or beside, f"{path}: relative import"
            if beside:
                assert (TWIN / f"{node.module}.py").is_file(), f"{path}: {node.module}"
                continue
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT / folder)
        yield path, relative.parts[0].removesuffix(".py")


def test_directions_inside_storm_jax():
    checked = 0
    for path, package in modules("storm_jax"):
        if package == "__init__":
            assert not imports(path), f"{path} imports something"
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("storm_jax.")}
        assert not used & COMMANDS, f"{path} imports a command"
        if package not in COMMANDS:
            extra = used - MAY_IMPORT[package] - {package}
            assert not extra, f"{path} imports {extra}"
        checked += 1
    assert checked > 20


def test_forbidden_packages():
    for folder in ("storm_jax", "kernels"):
        for path, package in modules(folder):
            roots = {name.split(".")[0] for name in imports(path)}
            bad = roots & FORBIDDEN.get(package, set())
            assert not bad, f"{path} imports {bad}"
            assert "kernels" not in roots, f"{path} imports the folder kernels/"


def test_only_the_twin_imports_torch():
    """Where a module of ours needs PyTorch, a function imports it when it is called."""
    checked = 0
    for path, _ in modules("storm_jax"):
        tree = ast.parse(path.read_text())
        tops = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        roots = {alias.name.split(".")[0] for n in tops for alias in n.names}
        roots |= {str(n.module).split(".")[0] for n in tops if isinstance(n, ast.ImportFrom)}
        if path.parent == TWIN:
            own = {name.split(".")[0] for name in imports(path)}
            assert not own & {"storm_kernels", "jax", "flax"}, path
            if "torch" in roots:
                assert "storm_jax" not in own, path
                checked += 1
        else:
            assert "torch" not in roots, path
    assert checked >= 2


def test_configs_are_plain():
    for path, _ in modules("configs"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"ml_collections", "configs"}, path


def test_transformers_imports_beside_the_folder_kernels():
    # Hugging Face has a package of that name: a kernels/__init__.py here would be taken for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import PreTrainedTokenizerFast; print(PreTrainedTokenizerFast)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import storm_jax.models.storm", "torch transformers av grain tensorflow"),
        # Data workers read benchmarks too.
        (
            "from storm_jax.evaluation import tasks; tasks.all_tasks()",
            "jax flax torch transformers av grain pyarrow",
        ),
    ],
)
def test_what_is_not_needed_is_not_imported(statement, without):
    code = (
        f"import sys; {statement};"
        f"bad = set({without.split()}) & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    env_path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": env_path, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
