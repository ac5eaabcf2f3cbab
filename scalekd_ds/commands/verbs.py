"""The verbs of the `scalekd` command: what each does, and commands to type."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Verb:
    """What `scalekd --help` shows of a verb.

    Attributes:
        about: What it does, in one line.
        examples: Commands to type.
        takes_run: Whether it also takes every field of a run as `--dotted.key value`.
    """

    about: str
    examples: tuple[str, ...]
    takes_run: bool = False


VERBS: dict[str, Verb] = {
    "train": Verb(
        "train a student, with or without a teacher",
        (
            "scalekd train --recipe fashion-ce --data.root runs/fashion-mnist --run.dir runs/mine",
            "scalekd train --gpus 8 --recipe swin_l-resnet50-advanced --data.root DIR --run.dir DIR",
            "scalekd train --hostfile launch/hosts --recipe swin_l-resnet50-advanced --data.root DIR --run.dir DIR",
            "deepspeed --hostfile launch/hosts --module scalekd_ds.commands.train --recipe NAME ...    # the same",
        ),
        takes_run=True,
    ),
    "cache": Verb(
        "keep a teacher's answers on disk, for runs without its trunk",
        (
            "scalekd cache --recipe swin_l-resnet50-traditional --data.root DIR --views 10 --out CACHE --dry-run",
            "scalekd cache --gpus 8 --recipe swin_l-resnet50-traditional --data.root DIR --views 10 --out CACHE",
            "scalekd train --gpus 8 --recipe swin_l-resnet50-traditional --data.root DIR --teacher_cache CACHE --run.dir RUN",
            "scalekd cache --info CACHE",
            "scalekd cache --verify CACHE",
        ),
        takes_run=True,
    ),
    "recipes": Verb("list the recipes, with the sizes of their models", ("scalekd recipes",)),
    "evaluate": Verb(
        "top-1 and top-5 of a consolidated file or any timm model",
        (
            "scalekd evaluate runs/mine/student.safetensors --data runs/fashion-mnist",
            "scalekd evaluate resnet50 --data DIR --image-size 288",
        ),
    ),
    "consolidate": Verb(
        "plain student weights from a checkpoint of any ZeRO stage",
        (
            "scalekd consolidate runs/mine student.safetensors",
            "scalekd consolidate runs/mine/checkpoints/step00000500 student.safetensors --weights student",
        ),
    ),
    "export": Verb(
        "a student as timm, Hugging Face, ONNX, TorchScript, torch.export",
        (
            "scalekd export --format timm runs/mine exported/timm",
            "scalekd export --format onnx student.safetensors exported/onnx",
        ),
    ),
    "push": Verb(
        "publish a student on a Hugging Face hub, with a model card",
        (
            "scalekd push runs/mine OWNER/NAME --license apache-2.0",
            "scalekd push runs/mine OWNER/NAME --dry-run --out exported/hub",
        ),
    ),
    "inspect": Verb(
        "contact sheet of attention, feature maps and predictions",
        ("scalekd inspect runs/mine runs/fashion-mnist/val --out sheet.png",),
    ),
    "plan": Verb(
        "memory, traffic, images/s and hours of a run beforehand",
        (
            "scalekd plan --recipe swin_l-resnet50-traditional --gpus 16 --gpu-memory 40",
            "scalekd plan --recipe swin_l-resnet50-traditional --gpus 8 --gpu-memory 40 --teacher-cache",
        ),
        takes_run=True,
    ),
    "doctor": Verb(
        "whether a job can start on the nodes of a hosts file",
        (
            "scalekd doctor --hostfile launch/hosts --recipe swin_l-resnet50-advanced --data.root DIR",
            "scalekd doctor --write-env NCCL_SOCKET_IFNAME=eth0",
        ),
        takes_run=True,
    ),
    "supervise": Verb(
        "start a job again from its last checkpoint when a node fails",
        ("scalekd supervise --hostfile launch/hosts -- --recipe NAME --data.root DIR --run.dir DIR",),
    ),
    "quickstart": Verb(
        "a first distillation: a small CNN learns from a Swin, in minutes",
        (
            "scalekd quickstart",
            "scalekd quickstart --seeds 3",
            "scalekd quickstart --data DIR --out runs/first",
        ),
    ),
    "prepare-data": Verb(
        "unpack Fashion-MNIST, or check that every image can be decoded",
        ("scalekd prepare-data fashion-mnist runs/fashion-mnist", "scalekd prepare-data verify DIR"),
    ),
    "completion": Verb(
        "print a shell's completion of verbs and flags",
        ("source <(scalekd completion bash)    # or zsh; from ~/.bashrc",),
    ),
}

# In the order of a user's work: a heading of `scalekd --help` -> its verbs.
GROUPS: dict[str, tuple[str, ...]] = {
    "begin": ("quickstart", "recipes", "prepare-data"),
    "before a run": ("plan", "doctor"),
    "train": ("cache", "train", "supervise"),
    "look at a student": ("evaluate", "inspect"),
    "ship it": ("consolidate", "export", "push"),
    "your shell": ("completion",),
}

DOCUMENTS = "https://scalekd-ds.github.io/scalekd_ds/"
# What `scalekd` alone shows: a heading -> commands to type, and what each does, or "" where it says that itself.
FIRST_COMMANDS: dict[str, dict[str, str]] = {
    "Begin here, without a GPU and without images of your own:": {
        "scalekd quickstart": "distil a small model, in six minutes",
    },
    "Then a run of your own, on a folder DIR with train/ and val/:": {
        "scalekd recipes": "published settings by name",
        "scalekd plan --recipe NAME --gpus 8 --gpu-memory 80": "",
        "scalekd train --gpus 8 --recipe NAME --data.root DIR --run.dir RUN": "",
        "scalekd evaluate RUN/student.safetensors --data DIR": "",
    },
    "On several machines:": {
        "scalekd doctor --hostfile HOSTS": "whether a job can start there",
        "scalekd train --hostfile HOSTS ...": "the same run on all of them",
    },
}


def module_of(verb: str) -> ModuleType:
    """Imports the module of a verb, a key of `VERBS`."""
    return import_module(f"scalekd_ds.commands.{verb.replace('-', '_')}")
