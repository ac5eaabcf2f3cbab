"""timm's own layout: config.json and model.safetensors, as timm's push_to_hf_hub writes and `local-dir:` reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from scalekd_ds.config import DataConfig
from scalekd_ds.durable_files import write_json
from scalekd_ds.errors import UserError
from scalekd_ds.export.subject import Subject

# of the preset's original weights, and not of these
_ORIGIN = (
    *(
        "url",
        "file",
        "hf_hub_id",
        "hf_hub_filename",
        "source",
        "state_dict",
        "tag",
        "license",
        "origin_url",
        "paper_name",
    ),
    *("paper_ids", "notes", "custom_load", "label_offset", "label_names", "label_descriptions", "test_input_size"),
    *("test_crop_pct", "architecture"),
)


def crop_pct(size: int, shorter: int) -> float:
    """timm's way to say that the shorter side becomes `shorter` pixels before the centre crop of `size`."""
    share = size / shorter
    # timm rounds size / share down
    return share if math.floor(size / share) == shorter else size / (shorter + 1e-3)


def config_of(subject: Subject) -> dict[str, Any]:
    """What config.json holds."""
    card = subject.card
    size = card["image_size"]
    data = DataConfig(image_size=size, eval_resize=card.get("eval_resize"))
    preset = getattr(subject.model, "pretrained_cfg", None) or {}
    return {
        "architecture": card["architecture"].split(".", 1)[0],
        "num_classes": card["num_classes"],
        "num_features": getattr(subject.model, "num_features", None),
        "label_names": card.get("classes"),
        "model_args": card.get("model_kwargs") or {},
        "pretrained_cfg": {
            **{key: value for key, value in preset.items() if key not in _ORIGIN and value is not None},
            # null where there is none, as timm asks for both
            "first_conv": preset.get("first_conv"),
            "classifier": preset.get("classifier"),
            "custom_load": False,
            "num_classes": card["num_classes"],
            "input_size": [3, size, size],
            "mean": card["mean"],
            "std": card["std"],
            "interpolation": card.get("interpolation", "bicubic"),
            "crop_pct": crop_pct(size, data.eval_shorter_side),
            "crop_mode": "center",
        },
    }


def write(subject: Subject, folder: Path) -> float:
    """Writes the folder and loads it back with timm.

    Raises:
        UserError: An architecture that timm itself does not have, or logits that differ.
    """
    architecture = subject.card["architecture"]
    home = timm.model_entrypoint(architecture.split(".", 1)[0]).__module__
    if not home.startswith("timm."):
        raise UserError(
            f"{architecture} is registered by {home.split('.', 1)[0]}, and timm alone cannot build it: take the format onnx, "
            "torchscript or torch_export."
        )
    # copies, since the format knows no tensors that share memory, as tied ones do
    state = {name: tensor.detach().clone().contiguous() for name, tensor in subject.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_of(subject))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return subject.check(torch.no_grad()(loaded), "the folder, loaded by timm,")


def usage(subject: Subject) -> str:
    """Python that loads the folder."""
    return """import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
logits = model(transform(Image.open("IMAGE").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])"""
