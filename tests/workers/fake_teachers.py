"""Targets and last stage of every family of teachers on CUDA tensors without a GPU: prints what makes the host wait."""

import json

import fake_cuda
import torch
from zoo import SHALLOW, TEACHERS, make_teacher

# other kinds of position embeddings
TEACHERS |= {
    "vit_small_patch16_rope_224": SHALLOW | {"img_size": 64},
    "vit_small_patch16_rope_mixed_224": SHALLOW | {"img_size": 64},
    "vit_pe_core_base_patch16_224": SHALLOW | {"img_size": 64},
}

fake_cuda.pretend()
waits = {}
for name in TEACHERS:
    with fake_cuda.tensors():
        # under a watch numbers can be read, which timm's constructors do
        with fake_cuda.Watch():
            teacher = make_teacher(name).to("cuda")
        images = torch.empty(2, 3, *teacher.preprocessing.size, device="cuda")
        (h, w), dim = teacher.last_input.grid, teacher.last_input.dim
        tokens = torch.empty(2, h * w, dim, device="cuda", requires_grad=True)
        with fake_cuda.Watch() as watch:
            teacher.targets(images)
            teacher.last_stage(tokens).sum().backward()
    assert watch.launches.total() > 20, name
    waits[name] = [*watch.syncs, *watch.copies]
print(json.dumps(waits))
