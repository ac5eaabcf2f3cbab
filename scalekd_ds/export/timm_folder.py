"""The format timm: config.json and model.safetensors, as timm's push_to_hf_hub writes and its `local-dir:` reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.errors import UserError
from scalekd_ds.export.student import LoadedStudent
from scalekd_ds.files.durable import save_tensors, write_json

# keys of a pretrained_cfg that describe timm's own weights, and not those of the student
_KEYS_OF_TIMMS_WEIGHTS = (
    "url file hf_hub_id hf_hub_filename source state_dict tag license origin_url paper_name paper_ids notes custom_load "
    "label_offset label_names label_descriptions test_input_size test_crop_pct architecture"
).split()


def crop_pct(size: int, shorter: int) -> float:
    """timm's `crop_pct` with which the shorter side becomes `shorter` pixels before the centre crop of `size` pixels."""
    share = size / shorter
    # timm rounds size / crop_pct down, which may be a pixel too few
    return share if math.floor(size / share) == shorter else size / (shorter + 1e-3)


def config_of(student: LoadedStudent) -> dict[str, Any]:
    """The content of config.json."""
    card = student.card
    size = card["image_size"]
    data = DataConfig(image_size=size, eval_resize=card.get("eval_resize"))
    preset = getattr(student.model, "pretrained_cfg", None) or {}
    return {
        "architecture": card["architecture"].split(".", 1)[0],
        "num_classes": card["num_classes"],
        "num_features": getattr(student.model, "num_features", None),
        "label_names": card.get("classes"),
        "model_args": card.get("model_kwargs") or {},
        "pretrained_cfg": {
            **{key: value for key, value in preset.items() if key not in _KEYS_OF_TIMMS_WEIGHTS and value is not None},
            # timm requires both keys, with null if the preset has none
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


def write(student: LoadedStudent, folder: Path) -> float:
    """Writes the folder and loads it back with timm.

    Raises:
        UserError: timm itself does not have the architecture, or the logits differ.
    """
    architecture = student.card["architecture"]
    module = timm.model_entrypoint(architecture.split(".", 1)[0]).__module__
    if not module.startswith("timm."):
        raise UserError(
            f"{architecture} is registered by {module.split('.', 1)[0]}, and timm alone cannot build it: take the format onnx, "
            "torchscript or torch_export."
        )
    # copies, since safetensors refuses tensors that share memory, as tied weights do
    state = {name: tensor.detach().clone().contiguous() for name, tensor in student.model.state_dict().items()}
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_json(folder / "config.json", config_of(student))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return student.check_logits(torch.no_grad()(loaded), "the folder, loaded by timm,")


def usage(student: LoadedStudent) -> str:
    """Python code that loads the folder."""
    return """import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
logits = model(transform(Image.open("IMAGE").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])"""
