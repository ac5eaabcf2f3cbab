"""The command that trains a student again: its recipe, and each field in which the run differed from it."""

from __future__ import annotations

import json
from typing import Any

from scalekd_ds.config import RunConfig
from scalekd_ds.export.origin import published_name
from scalekd_ds.names import shell_word
from scalekd_ds.recipes import RECIPES

# of `run`, which says where and how often a run writes, the one group that decides numbers
_OF_RUN = ("ds_config", "deterministic")


def training_command(config: dict[str, Any]) -> str:
    """The command line of a run, with a flag on each line.

    Folders and files are named without their paths; `DIR` stands for the folder of the images, which a reader has elsewhere.

    Args:
        config: The run's configuration, as its config.json has it.
    """
    recipe = config.get("recipe") or ""
    start = RECIPES[recipe]() if recipe in RECIPES else RunConfig()
    # through JSON, in which the tuples of the recipe are the lists of the file
    base = _flat(json.loads(json.dumps(start.as_dict())))
    flags = {"recipe": recipe} if recipe in RECIPES else {}
    flags |= {name: value for name, value in _flat(config).items() if name in base and base[name] != value}
    # the views are named, and the teacher that answered to them
    flags.pop("teacher_cache", None)
    if recipe not in RECIPES:
        flags.pop("recipe", None)
    if config["data"]["root"]:
        flags["data.root"] = "DIR"
    words = ["scalekd train"]
    for name, value in flags.items():
        words.append(f"--{name} {shell_word(_text(published_name(value)))}")
    return " \\\n    ".join(words)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The fields by their dotted names, which are their flags; those of `run` that decide no number are left out."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        # arguments of a model are one field, whose value is an object
        if isinstance(value, dict) and not name.endswith("_kwargs"):
            found |= {f"{name}.{key}": item for key, item in value.items() if name != "run" or key in _OF_RUN}
        else:
            found[name] = value
    return found
