"""Bytes of an entry of the teacher cache: what the teacher says about one view of one image."""

from __future__ import annotations

from typing import Literal, get_args

Store = Literal["int8", "bf16", "fp32"]
# how the tokens may be stored, the smallest first
STORES: tuple[Store, ...] = get_args(Store)
# log-probabilities of an entry where nothing else is said; the other classes share one more
TOP_LOGITS = 64

# the number of the sample as int64, and three colours, which are the sample's and not the view's, as float32
_HEAD = 8 + 3 * 4
_CHECKSUM = 4
_TOKEN_BYTES = {"int8": 1, "bf16": 2, "fp32": 4}
# int8 has a scale and a middle for each channel and image, in 16 bits each
_SCALE_BYTES = {"int8": 4, "bf16": 0, "fp32": 0}
_LOG_PROBABILITY = 4


def entry_bytes(tokens: int, dim: int, classes: int, store: Store, logits: int | None) -> int:
    """Bytes of one entry.

    Args:
        tokens: Tokens P of the teacher's last stage; 0 for a teacher that is used for its logits only.
        dim: Channels C of a token.
        classes: Classes K of the teacher; 0 for one without a classifier.
        store: How the tokens are stored.
        logits: Largest log-probabilities that are kept, each with its class, beside one of all other classes together;
            None keeps all K logits.

    Returns:
        P C and 4 C bytes in int8, 2 P C in bf16 or 4 P C in fp32; of k < K logits 6 k + 4 bytes (8 k + 4 above 65,536
        classes), of all 4 K; and 24 bytes for the sample, its colours and the checksum.
    """
    features = tokens * dim * _TOKEN_BYTES[store] + dim * _SCALE_BYTES[store] if tokens else 0
    if logits is None or logits >= classes:
        kept = classes * _LOG_PROBABILITY
    else:
        kept = logits * (class_bytes(classes) + _LOG_PROBABILITY) + _LOG_PROBABILITY
    return _HEAD + features + kept + _CHECKSUM


def class_bytes(classes: int) -> int:
    """Bytes of the number of a class: an unsigned 16-bit integer where `classes` allow one, else a 32-bit one."""
    return 2 if classes <= 2**16 else 4


def format_decimal(count: float) -> str:
    """Bytes as disks are sold, such as `1.2 MB` of 10^6."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.{2 if unit == 'TB' else 1}f} {unit}"
    return f"{round(count)} B"
