"""The format onnx: model.onnx, written by torch's exporter and checked by onnxruntime."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch.export import Dim

from scalekd_ds.export.student import LoadedStudent

# old enough for every current runtime
OPSET = 18
# bytes of weights above which they go into a second file, since a protobuf message holds at most 2^31 bytes
_MOST_EMBEDDED_BYTES = 1_900_000_000


def write(student: LoadedStudent, folder: Path) -> float:
    """Writes the file, with the classes and the normalisation in its metadata.

    Raises:
        UserError: The logits differ.
        Exception: The exporter or onnxruntime cannot take the student; they raise errors of their own, of dynamo and of the
            operators.
    """
    import onnxruntime

    file = folder / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            student.network,
            (student.example_images(),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: Dim("batch")},),
            opset_version=OPSET,
            verbose=False,
        )
    card = student.card
    metadata = {
        "classes": card.get("classes"),
        "mean": card["mean"],
        "std": card["std"],
        "normalised": student.normalised,
    }
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    num_bytes = sum(t.numel() * t.element_size() for t in student.network.state_dict().values())
    program.save(file, external_data=num_bytes > _MOST_EMBEDDED_BYTES)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return student.check_logits(run, "model.onnx, run by onnxruntime,")


def usage(student: LoadedStudent) -> str:
    """Python code that runs the file."""
    size = student.card["image_size"]
    return f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
images = np.zeros((8, 3, {size}, {size}), np.float32)  # any batch, {student.input_range}
(logits,) = session.run(["logits"], {{"images": images}})"""
