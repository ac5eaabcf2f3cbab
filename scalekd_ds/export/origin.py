"""Where a student comes from, as a public card may say it: names of models, weights and data, without anybody's folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from scalekd_ds.models.build import HUB_PREFIXES

_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# as `data.fashion` has them, whose room needs DALI, which export does not
FASHION = frozenset("t-shirt_top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split())
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model come from.

    Attributes:
        text: In words, for people.
        hub_id: `OWNER/NAME` on the hub, or None.
        license: Their licence as timm knows it, or None.
    """

    text: str
    hub_id: str | None = None
    license: str | None = None


def published_name(value: Any) -> Any:
    """A value of a card or a configuration without the folders of a path in it, since a card is published.

    `local-dir:` keeps the folder's own name, a file of weights and an absolute path their last part. Lists and dicts are
    followed; anything else stays as it is.
    """
    if isinstance(value, dict):
        return {key: published_name(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [published_name(item) for item in value]
    if not isinstance(value, str):
        return value
    prefix = "local-dir:" if value.startswith("local-dir:") else ""
    rest = value.removeprefix(prefix)
    if prefix or rest.startswith(("/", "~", "..")) or (rest.endswith(_FILES) and not rest.startswith(HUB_PREFIXES)):
        return prefix + Path(rest).name
    return value


def origin_of(name: str, weights: str) -> Origin:
    """Where a model of a run got its weights.

    Args:
        name: `teacher` or `student` of the run.
        weights: `teacher_weights` or `student_weights` of the run.
    """
    if weights == "none":
        return Origin("random weights")
    if weights != "pretrained":
        return Origin(f"the file `{published_name(weights)}`")
    source, _, where = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        return Origin(f"`{where}` on the hub", where.partition("@")[0])
    if source == "local-dir" or name.endswith(_FILES):
        return Origin(f"the file or folder `{published_name(name)}`")
    preset = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if preset is None or not preset.hf_hub_id:
        return Origin("timm's")
    return Origin(f"`{preset.hf_hub_id}` on the hub", preset.hf_hub_id, preset.license)


def teacher_origin(card: dict[str, Any], config: dict[str, Any] | None) -> Origin | None:
    """Where the teacher's weights come from; None without a teacher, or where nothing is known of the run."""
    if config is None or card.get("teacher", "none") == "none":
        return None
    return origin_of(config["teacher"], config["teacher_weights"])


def data_name(config: dict[str, Any]) -> str:
    """What the data is called: the name on the hub, or that of the folder, whose path says something about a disk."""
    data = config["data"]
    if data["train"].startswith("hf:"):
        return data["train"].split(":")[1]
    return Path(data["root"]).name or published_name(data["train"])


def datasets(card: dict[str, Any], config: dict[str, Any] | None) -> list[str]:
    """The data's names on the hub, where they are known: of a run on them, or of classes that no other data has."""
    if config is not None and config["data"]["train"].startswith("hf:"):
        return [data_name(config)]
    classes = card.get("classes") or []
    if len(classes) == len(FASHION) and set(classes) == FASHION:
        return ["zalando-datasets/fashion_mnist"]
    if len(classes) == 1000 and all(map(_WORDNET.fullmatch, classes)):
        return ["ILSVRC/imagenet-1k"]
    return []
