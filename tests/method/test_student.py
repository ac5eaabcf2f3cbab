"""The student's taps and logits over CNNs, MLPs and transformers."""

import pytest
import timm
import torch
from torch import nn
from zoo import STUDENTS as FAMILIES
from zoo import VIT, make_student

from scalekd_ds import Student
from scalekd_ds.errors import UserError
from scalekd_ds.student import Taps

# name -> (arguments, map before the last stage, last map), both (C, h, w) at 224 pixels: RECIPES' students
STUDENTS = {
    "resnet50": ({}, (1024, 14, 14), (2048, 7, 7)),
    "mobilenetv1_100": ({}, (512, 14, 14), (1024, 7, 7)),
    "mobilenetv3_small_100": ({}, None, None),
    "efficientnet_b0": ({}, None, None),
    "regnety_002": ({}, (152, 14, 14), (368, 7, 7)),
    "mobilenetv4_conv_small": ({}, (96, 14, 14), (960, 7, 7)),
    "efficientformer_l1": ({}, (224, 14, 14), (448, 7, 7)),
    "fastvit_t8": ({"layers": (1, 1, 1, 1)}, (192, 14, 14), (384, 7, 7)),
    "convnext_tiny": ({"depths": (1, 1, 1, 1)}, (384, 14, 14), (768, 7, 7)),
    "mixer_s16_224": ({}, (512, 14, 14), (512, 14, 14)),
    "resmlp_12_224": ({}, (384, 14, 14), (384, 14, 14)),
    "vit_small_patch16_224": (VIT, (48, 14, 14), (48, 14, 14)),
    "deit_small_patch16_224": (VIT, (48, 14, 14), (48, 14, 14)),
    "deit_small_distilled_patch16_224": (VIT, (48, 14, 14), (48, 14, 14)),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 1, 1)}, (384, 14, 14), (768, 7, 7)),
    "eva02_tiny_patch14_336": (VIT | {"img_size": 224}, (48, 16, 16), (48, 16, 16)),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_maps_and_logits_of_one_forward(name):
    kwargs, before, last = STUDENTS[name]
    student = Student(name, num_classes=10, image_size=224, **kwargs).eval()
    images = torch.randn(2, 3, 224, 224)
    calls = []
    student.model.register_forward_pre_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        out = student(images)
        assert not calls, "the taps must not run the model a second time"
        expected = student.model(images)
        assert torch.allclose(out.logits, expected, atol=1e-5 * max(1.0, expected.abs().max().item()))
    for expected, value in ((before, out.before), (last, out.last)):
        assert value.dim() == 4
        if expected:
            assert tuple(value.shape[1:]) == expected


@pytest.mark.parametrize(
    ("name", "indices", "normed"),
    [
        ("vit_small_patch16_224", (8, 11), True),
        ("mixer_b16_224", (9, 11), False),
        ("mixer_s16_224", (5, 7), False),
        ("resnet50", (3, 4), False),
        ("swin_tiny_patch4_window7_224", (2, 3), False),
        ("convnext_tiny", (2, 3), False),
    ],
)
def test_taps_are_where_the_published_code_has_them(name, indices, normed):
    with torch.device("meta"):
        taps = Student(timm.create_model(name)).taps
    assert (taps.indices, taps.normed_last) == (indices, normed)


@pytest.mark.parametrize("indices", [(1, 4), (3, 1), (2, 2), (-2, -1), (3, 4)])
def test_maps_that_a_student_does_not_have_are_named(indices):
    """As those of a recipe where `--student` names another model."""
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"student_taps is .* ConvNeXt has the feature maps 0 to 3"),
    ):
        Student(timm.create_model("convnext_atto"), taps=Taps(indices, False))


@pytest.mark.parametrize("stride", [8, 16])
def test_a_dilated_cnn_is_tapped_at_its_last_two_stages(stride):
    with torch.device("meta"):
        student = Student(timm.create_model("resnet50", output_stride=stride))
        out = student.shapes((224, 224))
    assert student.taps.indices == (3, 4)
    assert out.before.shape[1:] == (1024, 224 // stride, 224 // stride)
    assert out.last.shape[1:] == (2048, 224 // stride, 224 // stride)


@pytest.mark.parametrize(
    "name",
    [
        *("botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "coatnet_0_224", "convit_tiny", "efficientformerv2_s0"),
        *("gcvit_xxtiny", "hiera_tiny_224", "levit_128s", "maxvit_tiny_tf_224", "nest_tiny", "pit_ti_224"),
        *("swinv2_cr_tiny_224", "tnt_s_legacy_patch16_224", "visformer_tiny", "vit_relpos_small_patch16_224"),
        *("volo_d1_224", "resmlp_12_224"),
    ],
)
@pytest.mark.parametrize("size", [(128, 128), (96, 128)])
def test_models_of_one_grid_are_built_for_the_images(name, size):
    if name in ("convit_tiny", "nest_tiny") and size[0] != size[1]:
        # square images are all that these two take
        with torch.device("meta"), pytest.raises(UserError, match=r"cannot (take|be built)"):
            Student(name, 10, size).shapes(size)
        return
    with torch.device("meta"):
        out = Student(name, 10, size).shapes(size)
    assert out.logits.shape == (1, 10)


def test_the_vits_last_map_is_normed_and_has_no_prefix():
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **VIT).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        last = Student(model)(images).last
        expected = model.forward_features(images)[:, 1:]
    # two passes, which a library may round differently
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), expected)


def test_shapes_leave_modes_statistics_and_generators_alone():
    model = timm.create_model("resnet18", num_classes=5)
    model.layer1.eval()
    student = Student(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    student.shapes((64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model.layer1.training and not model.layer1[0].bn1.training


def test_a_module_that_cannot_be_tapped():
    with pytest.raises(UserError, match=r"Linear cannot be a student: it has no forward_intermediates\(\)"):
        Student(nn.Linear(2, 2))


def test_an_image_size_that_the_student_cannot_take():
    student = Student(timm.create_model("vit_small_patch16_224", **VIT))
    with pytest.raises(UserError, match="cannot take 96x96 images"):
        student.shapes((96, 96))


def test_channels_last_unless_the_cpu_library_would_crash():
    """oneDNN issue 6035: a strided 1x1 convolution of 8 channels writes out of bounds in channels-last."""
    assert Student(timm.create_model("resnet18", num_classes=10)).channels_last
    narrow = timm.create_model("resnet18", num_classes=10, channels=(8, 16, 32, 64), stem_width=8)
    student = Student(narrow)
    assert not student.channels_last
    for _ in range(5):
        sum(x.sum() for x in student(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.isfinite(p.grad).all() for p in narrow.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_over_all_ranks_are_of_the_same_network(name):
    """Its activations included, which timm keeps inside of BatchNorm in many families."""
    student = make_student(name).eval()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            # statistics and weights of a trained network
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5)
    images, state = torch.randn(2, 3, 64, 64), student.state_dict()
    batchnorms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())
    with torch.no_grad():
        expected = student(images)
        student.synchronise_batchnorm()
        found = student(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in student.modules()) == batchnorms
    assert list(student.state_dict()) == list(state)
    # the optimizer's parameters are the ones that are trained
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(student.state_dict().values(), state.values(), strict=True))
