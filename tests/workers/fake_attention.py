"""Which attention PyTorch picks on an H100 for heads of several sizes, with gradients: prints it by head size."""

import json

import fake_cuda
import torch

from scalekd_ds.kernels import cap_attention
from scalekd_ds.kernels.cross_attention import table

fake_cuda.pretend()
table._MEASURED.clear()
picked = {}
for head_size in (64, 128, 136, 192, 224, 256):
    with fake_cuda.tensors():
        q = torch.empty(1, 49, 8, head_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        kv = torch.empty(4, 49, 2, 8, head_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with fake_cuda.Watch() as watch:
            cap_attention(q, *kv.unbind(2), 0.2).sum().backward()
    picked[head_size] = [name for name, _ in watch.attention]
print(json.dumps(picked))
