"""Images that a model's patches do not divide lose their border, which is said; folders are no models."""

import pytest
import timm

from scalekd_ds.models.preprocessing import cut_off_notice

SMALL = {"vit_tiny_patch16_224": {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}}


@pytest.mark.parametrize(("size", "left"), [(32, 0), (31, 7), (33, 1), (36, 4), (40, 0), (47, 7)])
def test_the_border_that_is_not_seen_is_said(size, left):
    name = "vit_tiny_patch16_224"
    notice = cut_off_notice(timm.create_model(name, img_size=size, **SMALL[name]), size)
    assert (notice is None) == (left == 0)
    assert (
        not left
        or f"patches of VisionTransformer are 8 pixels and its images {size}: it does not see the last {left}" in notice
    )


def test_models_that_see_all_of_any_image_have_nothing_to_say():
    for name in ("resnet18", "convnext_atto", "pvt_v2_b0"):
        assert cut_off_notice(timm.create_model(name), 33) is None
    padded = timm.create_model(
        "vit_tiny_patch16_224", img_size=36, dynamic_img_pad=True, **SMALL["vit_tiny_patch16_224"]
    )
    assert cut_off_notice(padded, 36) is None
