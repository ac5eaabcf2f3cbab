"""Cases of the policies' kernels in Triton's interpreter against Pillow; run by test_policy.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from interpreted import print_cases
from policy_pixels import BICUBIC, BILINEAR, largest_differences

from scalekd_ds.data.policy import Op

# 19 x 19 pixels are more than a block of pixels
CASES = {
    "levels": {
        "side": 13,
        "ops": [
            *(Op(name) for name in ("AutoContrast", "Equalize", "Invert")),
            *(Op(name, (1.63,)) for name in ("Contrast", "Brightness")),
            *(Op("Contrast", (0.2,)), Op("Posterize", (3,)), Op("Solarize", (99,)), Op("SolarizeAdd", (40,))),
        ],
    },
    "blends": {"side": 19, "ops": [Op(name, (x,)) for name in ("Color", "Sharpness") for x in (0.0, 0.37, 1.9)]},
    "warps": {
        "side": 13,
        "ops": [
            *(Op("Rotate", (30.0,), BICUBIC), Op("Rotate", (-101.25,), BILINEAR), Op("Rotate", (90.0,), BICUBIC)),
            *(Op("ShearX", (0.27,), BICUBIC), Op("ShearY", (-0.99,), BILINEAR), Op("TranslateXRel", (-0.3,), BILINEAR)),
        ],
    },
}


def run(side: int, ops: list[Op]) -> dict[str, float]:
    return {"largest": float(largest_differences([[op] for op in ops], side).max())}


if __name__ == "__main__":
    print_cases(CASES, run)
