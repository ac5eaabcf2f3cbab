"""The cards that the roofline knows, and what it assumes of them and of the host. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

# Shares of the peaks that a good kernel is taken to reach: a large copy, and a large matrix product or convolution
COPY_SHARE, MATMUL_SHARE = 0.88, 0.75
# Microseconds between two kernels of one stream, in which the device does nothing
GAP_US = 2.0
# Microseconds after which the host has launched an operator: from Python through autocast, autograd and the dispatcher ...
EAGER_HOST_US = 8.0
# ... or from the code that inductor writes
COMPILED_HOST_US = 4.0
# FLOP of one element, on CUDA cores: of an operator with a root, an exponential or statistics, and of any other
HEAVY_FLOP, LIGHT_FLOP = 10, 1


@dataclass(frozen=True)
class Card:
    """A GPU by the peaks of its vendor's datasheet.

    Attributes:
        name: As the tables print it.
        half: Dense matrix products in bf16 or fp16 on tensor cores, in 10^12 FLOP/s.
        tf32: The same in TF32.
        fp32: Float32 on CUDA cores, where everything runs that is no matrix product.
        gb_s: Bandwidth of the memory, in 10^9 bytes/s.
        source: Where these figures are published.
    """

    name: str
    half: float
    tf32: float
    fp32: float
    gb_s: float
    source: str

    def seconds(self, kernel: dict, *, moved: float | None = None) -> float:
        """The slower of a kernel's bytes and its FLOP.

        Args:
            kernel: A kernel of `cost.Kernel`'s fields.
            moved: Bytes in place of the kernel's own.
        """
        moved = kernel["read"] + kernel["written"] if moved is None else moved
        rate = {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[kernel["unit"]]
        return max(moved / (self.gb_s * 1e9 * COPY_SHARE), kernel["flop"] / (rate * 1e12 * MATMUL_SHARE))


CARDS = {
    "H100": Card(
        "H100 SXM", 989.4, 494.7, 66.9, 3350.0, "NVIDIA H100 Tensor Core GPU datasheet (SXM, without sparsity)"
    ),
    "H200": Card(
        "H200 SXM", 989.4, 494.7, 66.9, 4800.0, "NVIDIA H200 Tensor Core GPU datasheet (SXM, without sparsity)"
    ),
    "A100": Card("A100 80GB SXM", 312.0, 156.0, 19.5, 2039.0, "NVIDIA A100 Tensor Core GPU datasheet (80GB SXM)"),
    "B200": Card("B200", 2250.0, 1125.0, 75.0, 8000.0, "NVIDIA DGX B200 datasheet, an eighth, without sparsity"),
    "L4": Card("L4", 121.0, 60.0, 30.3, 300.0, "NVIDIA L4 Tensor Core GPU datasheet, without sparsity"),
}
