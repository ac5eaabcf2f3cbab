"""Augmentation policies for a whole batch on its device: the pixels that timm's and Pillow's functions give.

The operations were drawn on the host (`policy.Policy.draw`), so the host knows which images get which kind. `plan_batch`
groups them and packs all parameters into one buffer, which is sent in one copy. `apply_plan` then takes the images of a
kind out of the batch, works on them together and puts them back. No size depends on pixels, so the host never waits. What
each kind does is written here in PyTorch, which is the specification of the Triton kernels that a GPU runs.

Every step repeats Pillow's arithmetic, with the same rounding to 8 bits after each operation. Policies amplify: a
difference of one level before Solarize or Equalize may be a large one behind it.
"""

from scalekd_ds.data.on_device.apply import apply_plan
from scalekd_ds.data.on_device.plan import Plan, plan_batch

__all__ = ["Plan", "apply_plan", "plan_batch"]
