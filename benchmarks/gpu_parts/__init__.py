"""The parts of `gpu.py`: each is a module of its name, with a function `run`.

`run(folder, seconds, dry, save)` puts files into `folder`, has to end within `seconds`, takes small sizes where `dry` is true,
passes what it has so far to `save` and returns the whole result. It raises where something that it shows does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """What is known of a part before it starts.

    Attributes:
        minutes: It ends within this time.
        needs: `gpu`, and packages; here and not in the module, which cannot be imported without them.
    """

    minutes: float
    needs: tuple[str, ...] = ("gpu",)


# in the order in which they run
PARTS = {
    "correct": Part(4.0, ("gpu", "pytest")),
    "train": Part(5.0, ("gpu", "deepspeed", "nvidia.dali", "jsonargparse")),
    "step": Part(5.0),
    "kernels": Part(4.0),
    "loader": Part(4.0, ("gpu", "nvidia.dali")),
    "compile": Part(4.0),
}
