"""One entry of a teacher cache, the answers to one view of one image, as a record of fixed size.

A shard is an array of such records in numpy's own file format, which anyone can open with `numpy.load(FILE, mmap_mode="r")`.
Types that numpy lacks are in integers of the same size: bfloat16 in `<i2`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scalekd_ds.teacher_cache.sizes import Store

# what tokens are held in: numpy's type, and torch's
_TOKENS: dict[str, tuple[str, torch.dtype]] = {
    "int8": ("|i1", torch.int8),
    "bf16": ("<i2", torch.bfloat16),
    "fp32": ("<f4", torch.float32),
}
# the sample of an entry whose image could not be used
ABSENT = -1


@dataclass(frozen=True)
class Layout:
    """What each entry of a cache holds.

    Attributes:
        tokens: (P, C), tokens and channels of the target T_n; None for a teacher that is used for its logits only.
        store: What the tokens are held in: `int8` with a scale and a middle for each channel and image, `bf16`, or `fp32`.
        classes: Number of logits K, 0 for none.
        top: The number k of largest logits that are held, with the rest as one mass; None holds all.
    """

    tokens: tuple[int, int] | None
    store: Store
    classes: int
    top: int | None

    @property
    def dtype(self) -> np.dtype:
        """The record as numpy has it; `checksum` is the CRC-32 of all bytes before it."""
        fields: list[tuple[Any, ...]] = [("sample", "<i8"), ("colour", "<f4", (3,))]
        if self.tokens is not None:
            if self.store == "int8":
                fields += [("scale", "<i2", (self.tokens[1],)), ("middle", "<f2", (self.tokens[1],))]
            fields.append(("tokens", _TOKENS[self.store][0], self.tokens))
        if self.classes and self.top is None:
            fields.append(("logits", "<f4", (self.classes,)))
        elif self.classes:
            wide = self.classes > 1 << 16
            fields.append(("top_classes", "<i4" if wide else "<u2", (self.top,)))
            fields += [("top_log_probs", "<f4", (self.top,)), ("rest_log_prob", "<f4")]
        return np.dtype([*fields, ("checksum", "<u4")])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens and list(self.tokens),
            "store": self.store,
            "classes": self.classes,
            "top": self.top,
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> Layout:
        """From what `as_dict` gave."""
        tokens = values["tokens"]
        return cls(tokens and (int(tokens[0]), int(tokens[1])), values["store"], values["classes"], values["top"])


def encode(layout: Layout, tokens: torch.Tensor, logits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The fields of a batch of entries, on the device of the tokens.

    Args:
        layout: What an entry holds.
        tokens: (B, P, C) target tokens; empty where an entry has none.
        logits: (B, K), or None where it has none.
    """
    out: dict[str, torch.Tensor] = {}
    if layout.tokens is not None and layout.store == "int8":
        out["scale"], out["middle"], out["tokens"] = quantise(tokens.float())
    elif layout.tokens is not None:
        out["tokens"] = tokens.to(_TOKENS[layout.store][1])
    if layout.classes and logits is not None:
        logits = logits.float()
        if layout.top is None:
            out["logits"] = logits
        else:
            log_probs = logits.log_softmax(-1)
            out["top_log_probs"], classes = log_probs.topk(layout.top)
            out["top_classes"] = classes.to(torch.int32)
            rest = log_probs.scatter(1, classes, -torch.inf)
            out["rest_log_prob"] = rest.logsumexp(-1)
    return out


def quantise(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens in 8 bits, with a scale and a middle for each channel and image: `middle + scale * quantised` is what they were.

    The middle is that between a channel's smallest and largest value, for channels vary less than they are away from 0; that
    matters most for the frequency view, which leaves their mean out. What is subtracted is the middle as it is kept, in
    float16, which is finer than bfloat16, and the scale is rounded up, so that no value is cut off.

    Args:
        tokens: (B, P, C) float32.

    Returns:
        (B, C) bfloat16 scales, (B, C) float16 middles, and (B, P, C) int8.
    """
    low, high = tokens.aminmax(dim=1)
    largest = torch.finfo(torch.float16).max
    middle = (low / 2.0 + high / 2.0).clamp(-largest, largest).to(torch.float16)
    rest = tokens - middle.float()[:, None]
    wanted = rest.abs().amax(1) / 127.0
    scale = wanted.to(torch.bfloat16)
    # the next larger number of a positive one has the next larger bits
    bits = scale.view(torch.int16)
    scale = torch.where(scale.float() < wanted, bits + 1, bits).view(torch.bfloat16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return scale, middle, (rest / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8)


def pack(
    layout: Layout, samples: np.ndarray, reasons: Mapping[int, str], fields: dict[str, np.ndarray], key: int
) -> np.ndarray:
    """Records of a batch, each with its checksum.

    Args:
        layout: What an entry holds.
        samples: (B,) samples.
        reasons: Sample -> reason of those whose image could not be used: `ABSENT`, and the reason in place of an answer.
        fields: What `encode` gave, and `colour`, (B, 3) mean of each colour over the view's pixels; on the host, as
            `to_numpy` makes it.
        key: Start of the checksums, by which an entry of another view or another cache is told.
    """
    records = np.zeros(len(samples), layout.dtype)
    records["sample"] = samples
    for name, values in fields.items():
        records[name] = values
    raw = records.view(np.uint8).reshape(len(records), -1)
    for place in np.flatnonzero(np.isin(samples, list(reasons))).tolist():
        room = raw[place, 8:-4]
        said = reasons[int(samples[place])].encode()[: len(room)]
        records["sample"][place] = ABSENT
        room[:] = 0
        room[: len(said)] = np.frombuffer(said, np.uint8)
    records["checksum"] = checksums(records, key)
    return records


def reasons_of(records: np.ndarray) -> dict[int, str]:
    """Place among the records -> reason of those that are `ABSENT`."""
    raw = records.view(np.uint8).reshape(len(records), -1)
    absent = np.flatnonzero(records["sample"] == ABSENT).tolist()
    return {place: raw[place, 8:-4].tobytes().rstrip(b"\0").decode(errors="replace") for place in absent}


def checksums(records: np.ndarray, key: int) -> np.ndarray:
    """(B,) CRC-32 of each record without its own checksum, begun with `key`."""
    size = records.dtype.itemsize
    data = memoryview(np.ascontiguousarray(records).view(np.uint8).data)
    return np.array(
        [zlib.crc32(data[i * size : (i + 1) * size - 4], key) for i in range(len(records))], dtype=np.uint32
    )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of the host as the array that a record takes."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def unpack(layout: Layout, records: np.ndarray) -> dict[str, torch.Tensor]:
    """The fields of records (B,) as tensors of the host, for `decode`."""
    out: dict[str, torch.Tensor] = {}
    for name in records.dtype.names or ():
        if name in ("sample", "colour", "checksum"):
            continue
        values = np.ascontiguousarray(records[name])
        # torch indexes with signed integers alone
        tensor = torch.from_numpy(values.astype(np.int32) if name == "top_classes" else values)
        out[name] = tensor.view(torch.bfloat16) if values.dtype == np.int16 else tensor
    return out


def decode(layout: Layout, entries: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Tokens (B, P, C) and logits (B, K), float32 on the device of the entries; None for what an entry lacks.

    Of logits of which the largest are held, the others are given equal shares of their mass: probabilities and the
    cross-entropy to them at temperature 1 are those of the teacher, but for what the others differ among themselves.
    """
    tokens = entries.get("tokens")
    if tokens is not None:
        tokens = tokens.float()
        if layout.store == "int8":
            tokens = tokens.mul_(entries["scale"].float()[:, None]).add_(entries["middle"].float()[:, None])
    logits = entries.get("logits")
    if layout.top is not None and layout.classes:
        others = (entries["rest_log_prob"] - float(np.log(layout.classes - layout.top)))[:, None]
        logits = others.expand(-1, layout.classes).scatter(1, entries["top_classes"].long(), entries["top_log_probs"])
    return tokens, logits
