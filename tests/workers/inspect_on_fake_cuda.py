"""A sheet's models on a GPU without values: what they give for pictures and predictions is drawn on the CPU.

Tensors of two devices that meet end this process. Prints the devices of all that the sheet is drawn from.
"""

from __future__ import annotations

import fake_cuda
import torch
from tiny_pair import student, teacher

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.inspection import compose
from scalekd_ds.inspection.inspected_models import ModelSource, wrap_model
from scalekd_ds.inspection.pictures import spectrum
from scalekd_ds.inspection.predictions import correctness, top_classes

SIDE = 64
NOWHERE = ModelSource(None, None, None)


def main() -> None:
    fake_cuda.pretend()
    with fake_cuda.tensors(), fake_cuda.Watch():
        models = compose.Models(
            wrap_model(student(), "student", "s", NOWHERE, {}),
            wrap_model(teacher(), "teacher", "t", NOWHERE, {}),
            wrap_model(student(), "baseline", "b", NOWHERE, {}),
            [],
        )
        device = next(models.student.model.parameters()).device
        assert device.type == "cuda"
        models.student.network.shapes((SIDE, SIDE))
        # pixels of another size than the teacher's, which resizes them
        for side in (SIDE, SIDE + 32):
            pixels = torch.rand(3, 3, side, side)
            outputs = {m.role: m.run(pixels.to(device)) for m in models.all}
            assert all(output.maps.device == device for output in outputs.values())
        pixels = torch.rand(3, 3, SIDE, SIDE)
        outputs = {m.role: m.run(pixels.to(device)) for m in models.all}
        drawn = []
        for restored in (True, False):
            distiller = None
            if restored:
                distiller = ScaleKD(
                    models.student.network, models.teacher.network, image_size=(SIDE, SIDE), verbose=False
                )
                distiller = distiller.to(device).eval()
            compose._restore_distiller = lambda models, size, distiller=distiller: distiller
            columns = compose._picture_columns(models, outputs, pixels, (SIDE, SIDE))
            drawn += [column.images for column in columns]
        assert len(columns) == 5 and len(drawn) > 2 * len(columns)
        drawn += [part for output in outputs.values() for part in top_classes(output.logits)]
        drawn += [spectrum(output.maps) for output in outputs.values()]
        found = correctness(models.all, [("a", pixels[0]), ("b", pixels[1])], lambda name: 0, batch_size=2)
        assert [name for name, _ in found] == ["a", "b"] and all(len(right) == 3 for _, right in found)
    print(*sorted({tensor.device.type for tensor in drawn}))


if __name__ == "__main__":
    main()
