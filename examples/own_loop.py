#!/usr/bin/env python3
"""ScaleKD in a bare PyTorch loop: no DeepSpeed, no configuration.

python examples/own_loop.py                                                     a pretrained Swin-T, 100 steps
python examples/own_loop.py --weights none --size 64 --batch 4 --steps 4        no download; seconds on a CPU
"""

import argparse

import timm
import torch
from safetensors.torch import save_file

from scalekd_ds import ScaleKD, Teacher

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--weights", default="pretrained", help="weights of the teacher: pretrained, none or a file")
parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", default="student.safetensors")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

teacher = Teacher("swin_tiny_patch4_window7_224", image_size=args.size, weights=args.weights)
student = timm.create_model("resnet18", num_classes=teacher.num_classes)
distiller = ScaleKD(student, teacher, image_size=args.size).to(device)  # prints how the two are paired
# its parameters are those of student and projectors; the teacher is frozen, and in eval mode whatever .train() says
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

# put your DataLoader here: images (B, 3, H, W) in the student's normalisation, labels (B,) or soft targets (B, K)
images = torch.randn(args.batch, 3, args.size, args.size)
labels = torch.randint(teacher.num_classes, (args.batch,))
loader = ((images, labels) for _ in range(args.steps))

for step, (images, labels) in enumerate(loader, 1):
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        losses = distiller(images.to(device), labels.to(device))  # the weighted terms by name, and their sum
    optimizer.zero_grad()
    losses["loss/total"].backward()
    optimizer.step()
    schedule.step()
    print(f"step {step}: " + "  ".join(f"{k.removeprefix('loss/')} {v.item():.3f}" for k, v in losses.items()))

# the projectors are no longer needed: what ships is the bare student, with timm's own names
save_file(distiller.student.state_dict(), args.out)
print(f"wrote {args.out}: timm.create_model('resnet18', checkpoint_path={args.out!r})")
