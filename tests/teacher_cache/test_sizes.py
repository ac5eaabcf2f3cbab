"""The bytes of an entry of a teacher cache, against numpy's records of the same fields."""

import numpy as np
import pytest

from scalekd_ds.teacher_cache.sizes import STORES, entry_bytes

TOKENS = {"int8": "<i1", "bf16": "<i2", "fp32": "<f4"}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shape", [(49, 1536), (4, 3), None])
@pytest.mark.parametrize(
    ("classes", "top"), [(0, None), (0, 64), (10, None), (10, 64), (64, 64), (1000, 64), (65_536, 3), (65_537, 3)]
)
def test_an_entry_is_as_long_as_a_record_of_its_fields(store, shape, classes, top):
    fields = [("sample", "<i8"), ("colours", "<f4", (3,))]
    if shape is not None:
        fields.append(("tokens", TOKENS[store], shape))
        if store == "int8":
            fields += [("scales", "<i2", shape[1:]), ("middles", "<i2", shape[1:])]
    if classes and (top is None or top >= classes):
        fields.append(("logits", "<f4", (classes,)))
    elif classes:
        number = "<u2" if classes - 1 <= np.iinfo(np.uint16).max else "<u4"
        fields += [("classes", number, (top,)), ("log_probabilities", "<f4", (top,)), ("rest", "<f4")]
    fields.append(("checksum", "<u4"))
    assert entry_bytes(*(shape or (0, 0)), classes, store, top) == np.dtype(fields).itemsize
