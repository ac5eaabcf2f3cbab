"""model.onnx, by torch's exporter, and checked by onnxruntime."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch.export import Dim

from scalekd_ds.export.subject import Subject, cannot

# what every runtime of the last years reads
OPSET = 18
# a protobuf message ends at 2^31 bytes; above this the weights go into a file beside it
_WHOLE = 1_900_000_000


def write(subject: Subject, folder: Path) -> float:
    """Writes the file, with the classes and the normalisation in its metadata.

    Raises:
        UserError: The exporter or onnxruntime cannot take the student, or the logits differ.
    """
    import onnxruntime

    file = folder / "model.onnx"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                subject.network,
                (subject.images(),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
        card = subject.card
        told = {
            "classes": card.get("classes"),
            "mean": card["mean"],
            "std": card["std"],
            "normalised": subject.normalised,
        }
        program.model.metadata_props.update({key: json.dumps(value) for key, value in told.items()})
        bytes_ = sum(t.numel() * t.element_size() for t in subject.network.state_dict().values())
        program.save(file, external_data=bytes_ > _WHOLE)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    # the exporter raises errors of its own, of dynamo's and of the operators'
    except Exception as error:
        raise cannot(subject, "onnx", error) from None

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return subject.check(run, "model.onnx, run by onnxruntime,")


def usage(subject: Subject) -> str:
    """Python that runs the file."""
    size = subject.card["image_size"]
    images = "in [0, 1]" if subject.normalised else "normalised with the mean and std above"
    return f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
images = np.zeros((8, 3, {size}, {size}), np.float32)  # any batch, {images}
(logits,) = session.run(["logits"], {{"images": images}})"""
