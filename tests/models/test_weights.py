"""Weights from files of every origin: the same numbers come out, or one line says why not."""

import json
import re

import pytest
import timm
import torch
from golden_files import golden, relative_error
from golden_models import eva, resnet18_base8, swin
from weight_files import (
    RESNET,
    SWIN,
    VIT,
    facebook_deit3,
    microsoft_swin,
    mmpretrain_resnet_v1d,
    mmpretrain_vit,
    same_outputs,
    shaken,
    small_swin,
    vit,
    written,
)

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.load_weights import load_weights

E1, F1 = "e1_flow_swin_resnet18_v2", "f1_flow_beit_resnet18_nokd"


def official(name: str, part: str) -> dict[str, torch.Tensor]:
    return golden(name).below("state") if part == "all" else golden(name).below(f"state.{part}")


# -- published layouts, against numbers recorded from the official implementation


def test_the_official_swin_gives_the_official_features_and_logits(tmp_path):
    checkpoint = {"meta": {"epoch": 300}, "state_dict": official(E1, "teacher")}
    model = swin().eval()
    assert load_weights(model, written(checkpoint, tmp_path / "swin.pth")) == []
    targets = Teacher(model).targets(golden(E1)["input.images_f16"].float())
    assert relative_error(targets.tokens, golden(E1)["out.fea_t_m1"].flatten(2).transpose(1, 2)) < 1e-5
    assert relative_error(targets.logits, golden(E1)["out.logit_t"]) < 1e-5


def test_the_official_beit_gives_the_official_tokens(tmp_path):
    state = official(F1, "teacher")
    # the recorded teacher was built without the norm of the mean token, which released EVA weights have
    state |= {"backbone.ln2.weight": torch.full((16,), 3.0), "backbone.ln2.bias": torch.full((16,), 4.0)}
    model = eva().eval()
    load_weights(model, written(state, tmp_path / "eva.safetensors"))
    tokens = Teacher(model).targets(golden(E1)["input.images_f16"].float()).tokens
    assert relative_error(tokens, golden(F1)["out.fea_t_m1"].flatten(2).transpose(1, 2)) < 2e-5
    assert model.fc_norm.weight.unique().tolist() == [3.0] and model.fc_norm.bias.unique().tolist() == [4.0]


def test_the_student_of_an_official_distiller_is_found_in_its_checkpoint(tmp_path):
    state = official(E1, "all")
    assert any(k.startswith("distill_losses.") for k in state) and any(k.startswith("teacher.") for k in state)
    student = resnet18_base8()
    load_weights(student, written({"state_dict": state}, tmp_path / "distiller.pth"))
    with torch.no_grad():
        logits = student.train()(golden(E1)["input.images_f16"].float())
    assert relative_error(logits, golden(E1)["out.logit_s"]) < 1e-5


@pytest.mark.parametrize(
    ("layout", "build", "size"),
    [
        (microsoft_swin, small_swin, 32),
        (mmpretrain_vit, vit, 32),
        (facebook_deit3, lambda: timm.create_model("deit3_small_patch16_224", num_classes=5, **VIT).eval(), 32),
        (mmpretrain_resnet_v1d, lambda: timm.create_model("resnet50d", num_classes=5, **RESNET).eval(), 64),
    ],
)
def test_weights_of_other_published_layouts_give_the_same_outputs(tmp_path, layout, build, size):
    theirs, ours = shaken(build()), build()
    state = layout(theirs)
    assert set(state) != set(theirs.state_dict())
    assert load_weights(ours, written({"model": state}, tmp_path / "released.pth")) == []
    same_outputs(ours, theirs, size)


# -- wrappers


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda s: s, ""),
        (lambda s: s, "module."),
        (lambda s: s, "module.student."),
        (lambda s: s, "_orig_mod.module."),
        (lambda s: {"model": s, "epoch": 3}, "backbone."),
        (lambda s: {"state_dict": s, "step": torch.tensor(5)}, "model."),
        (lambda s: {"student": s}, "module.backbone."),
        (lambda s: {"model": {"state_dict": s}}, ""),
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrap, prefix):
    theirs, ours = shaken(vit()), vit()
    state = {prefix + k: v for k, v in theirs.state_dict().items()}
    assert load_weights(ours, written(wrap(state), tmp_path / "w.pt")) == []
    same_outputs(ours, theirs)


def test_averaged_weights_come_first_and_are_named(tmp_path):
    raw, averaged, ours = vit(), shaken(vit()), vit()
    content = {"model": raw.state_dict(), "model_ema": {f"module.{k}": v for k, v in averaged.state_dict().items()}}
    assert load_weights(ours, written(content, tmp_path / "w.pth")) == [
        "took 'model_ema', of averaged weights; left out: 'model'"
    ]
    same_outputs(ours, averaged)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    state = vit().state_dict()
    path = written(state | {f"module.{k}": v for k, v in state.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has 'cls_token' twice, also as 'module.cls_token'"):
        load_weights(vit(), path)


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.bfloat16, "safetensors"), (torch.float16, "pth")])
def test_half_precision_is_loaded_in_full(tmp_path, dtype, suffix):
    theirs, ours = shaken(small_swin(window_size=2)), small_swin()
    path = written({k: v.to(dtype) for k, v in theirs.state_dict().items()}, tmp_path / f"w.{suffix}")
    load_weights(ours, path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.norm.weight, theirs.norm.weight.to(dtype).float(), rtol=0, atol=0)


# -- positions


def test_position_embeddings_take_another_grid(tmp_path):
    theirs, ours = shaken(vit()), vit(img_size=48)
    notes = load_weights(ours, written(theirs.state_dict(), tmp_path / "w.safetensors"))
    assert notes == ["resized pos_embed from 1x17x24 to 1x37x24 for another grid"]
    assert torch.equal(ours.pos_embed[:, :1], theirs.pos_embed[:, :1])
    grid = theirs.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)


def test_relative_position_tables_take_another_window(tmp_path):
    theirs, ours = shaken(small_swin(window_size=2)), small_swin()
    notes = load_weights(ours, written(microsoft_swin(theirs), tmp_path / "w.pth"))
    assert notes == [
        "resized layers.0.blocks.0.attn.relative_position_bias_table from 9x1 to 49x1 for another grid, "
        "and 3 more such tables"
    ]
    for mine, his in zip(ours.layers[1].blocks, theirs.layers[1].blocks, strict=True):
        # the offset of a token to itself, and the largest ones, stay where they are
        mine, his = (b.attn.relative_position_bias_table for b in (mine, his))
        torch.testing.assert_close(mine[24], his[4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine[[0, 6, 42, 48]], his[[0, 2, 6, 8]], rtol=1e-5, atol=1e-5)


# -- classifiers


def test_a_teacher_by_name_has_the_classes_of_its_file(tmp_path, capsys):
    theirs = shaken(small_swin(7))
    path = written(theirs.state_dict(), tmp_path / "w.safetensors")
    teacher = Teacher("swin_tiny_patch4_window7_224", weights=str(path), **SWIN)
    assert teacher.num_classes == 7 and capsys.readouterr().out == ""
    same_outputs(teacher.model, theirs)
    with pytest.raises(UserError, match=r"has 7 classes and the student 5: logit KD needs the same"):
        ScaleKD(timm.create_model("resnet18", num_classes=5), teacher, image_size=32, verbose=False)
    with pytest.raises(UserError, match=r"head.fc.weight \[7, 24\], not \[5, 24\].*number of classes: 7 in the file"):
        Teacher("swin_tiny_patch4_window7_224", weights=str(path), num_classes=5, **SWIN)
    assert Teacher("swin_tiny_patch4_window7_224", weights=str(path), num_classes=0, **SWIN).num_classes == 0
    assert "classifier of 7 classes is left out" in capsys.readouterr().out


def test_a_name_without_classes_takes_those_of_its_file(tmp_path):
    theirs = shaken(timm.create_model("vit_small_patch14_dinov2", num_classes=7, **VIT).eval())
    path = written(theirs.state_dict(), tmp_path / "w.safetensors")
    assert timm.create_model("vit_small_patch14_dinov2", **VIT).num_classes == 0
    teacher = Teacher("vit_small_patch14_dinov2", weights=str(path), **VIT)
    assert teacher.num_classes == 7
    same_outputs(teacher.model, theirs)


def test_a_teacher_without_classifier_gives_features_only(tmp_path, capsys):
    state = {k: v for k, v in vit().state_dict().items() if not k.startswith("head.")}
    teacher = Teacher("vit_tiny_patch16_224", weights=str(written(state, tmp_path / "w.pth")), **VIT)
    assert teacher.num_classes == 0 and "features only" in capsys.readouterr().out
    assert teacher.targets(torch.randn(1, 3, 32, 32)).logits is None


def test_a_student_of_other_classes_starts_its_classifier_fresh(tmp_path, capsys, monkeypatch):
    theirs = shaken(timm.create_model("resnet18", num_classes=7, channels=(16, 16, 16, 16)))
    path = written(theirs.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(0)
    ours = build_model("resnet18", 5, {"channels": (16, 16, 16, 16)}, str(path))
    assert capsys.readouterr().out == f"{path}: it has 7 classes: the classifier (fc) of 5 starts fresh\n"
    assert ours.fc.weight.shape == (5, 16) and ours.fc.weight.abs().max() < 1
    mine = {k: v for k, v in ours.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.items())
    monkeypatch.setenv("RANK", "1")
    build_model("resnet18", 5, {"channels": (16, 16, 16, 16)}, str(path))
    assert capsys.readouterr().out == ""


# classifiers that are no single layer of the model's: two branches, a norm before it, another one beside it
@pytest.mark.parametrize("name", ["crossvit_9_240", "levit_128s", "sequencer2d_s", "volo_d1_224"])
def test_a_classifier_of_several_parts_is_kept(tmp_path, name, capsys):
    theirs = timm.create_model(name, num_classes=3)
    path = written(theirs.state_dict(), tmp_path / "w.safetensors")
    for classes in (None, 3):
        ours = build_model(name, classes, None, str(path)).state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    assert capsys.readouterr().out == ""
    assert build_model(name, 5, None, str(path)).num_classes == 5
    assert "it has 3 classes: the classifier (head" in capsys.readouterr().out


# families whose classifier is more than one layer, by the names of those that have the outputs
NESTED = {
    "levit_128s": {"img_size": 64},
    "repvit_m0_9": {},
    "samvit_base_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3},
}


# the RepVIT can be built at its true size alone
@pytest.mark.parametrize(
    "name", ["levit_128s", pytest.param("repvit_m0_9", marks=pytest.mark.slow), "samvit_base_patch16_224"]
)
def test_a_classifier_of_several_layers_is_kept_where_the_classes_are_the_same(tmp_path, name, capsys):
    theirs = shaken(timm.create_model(name, num_classes=7, **NESTED[name]).eval())
    path = str(written(theirs.state_dict(), tmp_path / "w.safetensors"))
    # a student, and a teacher that takes the classes of its file
    for count in (7, None):
        ours = build_model(name, count, NESTED[name], path).eval()
        assert ours.num_classes == 7 and capsys.readouterr().out == ""
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert build_model(name, 5, NESTED[name], path).num_classes == 5
    assert "it has 7 classes: the classifier" in capsys.readouterr().out
    assert build_model(name, 0, NESTED[name], path).num_classes == 0
    assert "classifier of 7 classes is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("hiera_tiny_224", {"embed_dim": 32, "stages": (1, 1, 1, 1)}),
        ("mixer_s32_224", {}),
        ("gmlp_ti16_224", {}),
        ("levit_128s", {}),
        ("nest_tiny", {}),
        ("cait_xxs24_224", {}),
    ],
)
def test_weights_that_timm_cannot_resize_are_said_to_be_of_another_image_size(tmp_path, name, kwargs):
    state = timm.create_model(name, num_classes=3, img_size=64, **kwargs).state_dict()
    path = str(written(state, tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match=r"Another image size: timm does not resize .* of this model for another grid"):
        build_model(name, 3, kwargs, path, 96)
    own = {**kwargs, "pretrained_cfg_overlay": {"file": path, "num_classes": 3}}
    with pytest.raises(UserError, match=r"pretrained weights of .* do not fit this model .*size mismatch.* image size"):
        build_model(name, 3, own, "pretrained", 96)


# -- names that are folders or files


def test_a_folder_in_the_hubs_format_is_a_teacher(tmp_path):
    theirs = shaken(vit(7))
    timm.models.save_for_hf(theirs, tmp_path / "model", model_args=VIT)
    teacher = Teacher(f"local-dir:{tmp_path}/model")
    assert teacher.num_classes == 7
    same_outputs(teacher.model, theirs)
    assert build_model(f"local-dir:{tmp_path}/model", 5, None, "pretrained", 48).patch_embed.grid_size == (6, 6)
    with pytest.raises(UserError, match=r"local-dir:/nowhere has no model of timm's that can be read .*config.json"):
        build_model("local-dir:/nowhere")


def test_a_consolidated_student_is_a_teacher_and_a_start(tmp_path):
    theirs = shaken(small_swin(7))
    path = written(theirs.state_dict(), tmp_path / "student.safetensors")
    card = {"architecture": "swin_tiny_patch4_window7_224", "num_classes": 7, "model_kwargs": SWIN, "image_size": 32}
    path.with_suffix(".json").write_text(json.dumps(card | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
    teacher = Teacher(str(path), image_size=224)
    assert teacher.num_classes == 7 and teacher.preprocessing.mean == (0.1, 0.2, 0.3)
    same_outputs(teacher.model, theirs)
    assert build_model(str(path), 5, image_size=64).patch_embed.img_size == (64, 64)
    student = build_model(str(path), 5)
    assert student.num_classes == 5 and student.patch_embed.img_size == (32, 32)
    assert torch.equal(student.norm.weight, theirs.norm.weight)


@pytest.mark.parametrize("name", ["swin.pth", "dir/model.pt", "resnet50.bin"])
def test_a_file_is_no_name(name):
    with pytest.raises(UserError, match=rf"'{name}' is a file of weights, .* timm name, .*--teacher_weights {name}"):
        Teacher(name)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(
        UserError, match=r"is a folder, and no model: give a .safetensors with its card, as a run writes"
    ):
        build_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match=rf"is a folder, and no model: give local-dir:{tmp_path}\."):
        build_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(UserError, match=r"is a folder, and no model: give a file in it \(student.safetensors\)"):
        build_model(str(tmp_path))


def test_a_safetensors_without_card_says_how_to_name_its_model(tmp_path):
    path = written(vit().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"has no card: .* timm name, and the file as --teacher_weights {path}"):
        Teacher(str(path))


def test_a_card_that_lacks_a_field_is_named(tmp_path):
    path = written(vit().state_dict(), tmp_path / "w.safetensors")
    card = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_kwargs": VIT}
    # as an editor of another system saves it
    path.with_suffix(".json").write_text(json.dumps(card), encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"w.json has no 'image_size': consolidate"):
        build_model(str(path))


def test_a_folder_of_an_architecture_that_timm_lacks_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet181", "pretrained_cfg": {}}')
    with pytest.raises(UserError, match=r"is of 'resnet181', which timm lacks\. Did you mean 'resnet18'"):
        build_model(f"local-dir:{tmp_path}")


# -- files that do not fit


def renamed(pattern, replacement):
    return lambda: {re.sub(pattern, replacement, k): v for k, v in vit().state_dict().items()}


MISFITS = {
    "deeper": (lambda: vit(depth=4).state_dict(), r"24 unexpected: blocks.2.norm1.weight.*Another depth: blocks has 4"),
    "shallower": (lambda: vit(depth=1).state_dict(), r"12 missing: blocks.1.norm1.weight, .*, \.\.\.\. Another depth"),
    "wider": (lambda: vit(embed_dim=48).state_dict(), r"cls_token \[1, 1, 48\], not \[1, 1, 24\].*Another width"),
    "patch": (lambda: vit(patch_size=4).state_dict(), r"Another patch size: 4 pixels in the file and 8 in the model"),
    "classes": (
        lambda: vit(9).state_dict(),
        r"2 of another shape: head.weight \[9, 24\], not \[5, 24\].*9 in the file",
    ),
    "wrapper": (
        lambda: {f"net.{k}": v for k, v in vit().state_dict().items() if k != "norm.bias"},
        r"names start with 'net.', a wrapper's",
    ),
    "transformers": (renamed(r"^blocks\.", "encoder.layer."), r"Hugging Face transformers'"),
    "dino": (renamed(r"^blocks\.(\d+)\.\w+", r"head.mlp.\1"), r"DINO training checkpoint"),
    "mmpretrain": (
        renamed(r"^blocks\.(\d)", r"stages.\1.depthwise_conv.bn"),
        r"mmpretrain's: .*Swin, ViT, BEiT/EVA and ResNet",
    ),
    "resnet of transformers": (renamed(r"^blocks\.", "resnet.embedder.embedder."), r"Hugging Face transformers'"),
    "regnet of torchvision": (renamed(r"^blocks\.", "trunk_output.block1."), r"torchvision's"),
    "LoRA": (renamed(r"qkv\.weight$", "qkv.lora_A.default.weight"), r"LoRA adapters: merge them"),
    "weight norm": (renamed(r"head\.weight$", "head.parametrizations.weight.original0"), r"are parametrized or pruned"),
    "ZeRO-3": (lambda: {k: torch.empty(0) for k in vit().state_dict()}, r"Its tensors are empty, as ZeRO-3"),
    "JAX": (
        lambda: {k: v.T.contiguous() if v.dim() == 2 and "head" not in k else v for k, v in vit().state_dict().items()},
        r"linear layers are transposed",
    ),
    "pooled": (renamed(r"^norm\.", "fc_norm."), r'add \{"global_pool": "avg"\} to'),
    "sequential head": (
        lambda: vit().state_dict() | {"head.1.weight": torch.ones(5, 24)},
        r"classifier has other parts than the model's \(head.1.weight\)",
    ),
    "other": (lambda: microsoft_swin(small_swin()), r"Hardly a name is the same: is it another architecture\?"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_explained(tmp_path, case):
    state, words = MISFITS[case]
    path = written(state(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as error:
        load_weights(vit(), path)
    message = str(error.value)
    assert message.startswith(f"{path} does not fit VisionTransformer: ") and "\n" not in message
    for kind in re.split("; ", message):
        listed = re.search(r"\d+ (?:missing|unexpected): (.*?)(?:, \.\.\.|$|\. )", kind)
        assert listed is None or len(listed[1].split(", ")) <= 5
