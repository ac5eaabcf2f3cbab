"""The model in files of other trainers, which keep averages, optimizers, losses and other models beside it."""

import json

import pytest
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel
from weight_files import same_outputs, shaken, vit, written

from scalekd_ds.errors import UserError
from scalekd_ds.models.load_weights import load_weights


def put(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def adam_state(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


LOSS, HALF = torch.tensor(0.4), torch.float16
# name -> (what a trainer saves, from the state of the model that is meant and of another one; the note about it)
HOLDS = {
    "bare": (lambda s, o: s, None),
    "PyTorch's tutorial": (lambda s, o: {"epoch": 5, "model_state_dict": s, "loss": LOSS}, None),
    "its optimizer": (lambda s, o: {"model_state_dict": s, "optimizer_state_dict": adam_state(vit())}, None),
    "an optimizer of another name": (lambda s, o: {"net": s, "opt": adam_state(vit())}, None),
    "net": (lambda s, o: {"net": s, "acc": 90.0}, None),
    "network": (lambda s, o: {"network": s}, None),
    "weights": (lambda s, o: {"weights": s, "version": 2}, None),
    "an unknown key": (lambda s, o: {"my_vit": s, "epoch": 1}, None),
    "dicts in dicts": (lambda s, o: {"checkpoint": {"model": {"state_dict": s}}, "epoch": 1}, None),
    "Lightning": (
        lambda s, o: {"state_dict": put("model.", s), "optimizer_states": [adam_state(vit())], "callbacks": {"x": o}},
        None,
    ),
    "Lightning, compiled": (
        lambda s, o: {"state_dict": put("model._orig_mod.", s), "hyper_parameters": {"lr": LOSS}},
        None,
    ),
    "a Lightning module's net": (lambda s, o: {"state_dict": put("net.", s)}, "took the names that start with 'net.'"),
    "a metric beside it": (
        lambda s, o: {"state_dict": put("model.", s) | {"criterion.weight": LOSS}},
        "took the names that start with 'model.' in 'state_dict'; left out: 'criterion.'",
    ),
    "DDP": (lambda s, o: put("module.", s), None),
    "DDP, compiled": (lambda s, o: {"model": put("module._orig_mod.", s)}, None),
    "a teacher's dict": (lambda s, o: {"student": s, "teacher": o}, "took 'student'; left out: 'teacher'"),
    "a teacher's names": (
        lambda s, o: put("student.", s) | put("teacher.", o),
        "took the names that start with 'student.'; left out: 'teacher.'",
    ),
    "a student and its teacher behind DDP": (
        lambda s, o: put("module.student.", s) | put("module.teacher.", o),
        "took the names that start with 'module.student.'; left out: 'teacher.'",
    ),
    "a Lightning module's student and teacher": (
        lambda s, o: {"state_dict": put("model.student.", s) | put("model.teacher.", o)},
        "took the names that start with 'model.student.' in 'state_dict'; left out: 'teacher.'",
    ),
    "an average behind DDP": (
        lambda s, o: put("module.online.", o) | put("module.ema.", s),
        "took the names that start with 'module.ema.', of averaged weights; left out: 'online.'",
    ),
    "an encoder behind DDP": (
        lambda s, o: put("module.encoder_q.", s),
        "took the names that start with 'module.encoder_q.'",
    ),
    "torchvision's references": (
        lambda s, o: {"model": put("module.", o), "model_ema": put("module.module.", s) | {"n_averaged": LOSS}},
        "took the names that start with 'module.' in 'model_ema', of averaged weights; left out: 'n_averaged', 'model'",
    ),
    "mmengine's": (
        lambda s, o: {"meta": {}, "state_dict": o, "ema_state_dict": put("module.", s) | {"steps": LOSS}},
        "took the names that start with 'module.' in 'ema_state_dict', of averaged weights; left out: 'steps', 'state_dict'",
    ),
    "DINO's": (
        lambda s, o: {
            "student": put("module.backbone.", s),
            "teacher": put("backbone.", o),
            "dino_loss": {"center": LOSS},
        },
        "took 'student'; left out: 'teacher'",
    ),
    "DeepSpeed's mp_rank": (lambda s, o: {"module": s, "optimizer": None, "ds_config": {}, "param_shapes": [{}]}, None),
    "open_clip's": (
        lambda s, o: put("visual.trunk.", s) | {"logit_scale": LOSS, "transformer.ln_1.weight": LOSS},
        "took the names that start with 'visual.trunk.'; left out: 'logit_scale', 'transformer.'",
    ),
    "parameters": (lambda s, o: {name: torch.nn.Parameter(value) for name, value in s.items()}, None),
    "float64": (lambda s, o: {name: value.double() for name, value in s.items()}, None),
    **{
        f"a block in {word}": (
            lambda s, o, word=word: {n.replace("blocks.1.", f"blocks.1.{word}"): t for n, t in s.items()},
            None,
        )
        for word in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod.")
    },
    "blocks compiled behind DDP": (
        lambda s, o: {
            "model": put("module.", {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in s.items()})
        },
        None,
    ),
    "model and ema": (lambda s, o: {"model": o, "ema": s}, "took 'ema', of averaged weights; left out: 'model'"),
    "timm's": (
        lambda s, o: {"state_dict": o, "state_dict_ema": s, "arch": "vit", "optimizer": {"state": {0: {"step": LOSS}}}},
        "took 'state_dict_ema', of averaged weights; left out: 'state_dict'",
    ),
    "an average with DDP": (
        lambda s, o: {"model": put("module.", o), "model_ema": put("module.", s)},
        "took 'model_ema', of averaged weights; left out: 'model'",
    ),
    "half precision beside an average": (
        lambda s, o: {"model": {k: v.to(HALF) for k, v in o.items()}, "ema_state_dict": s},
        "took 'ema_state_dict', of averaged weights; left out: 'model'",
    ),
    "ema_pytorch's in a trainer": (
        lambda s, o: put("ema.online_model.", o) | put("ema.ema_model.", s) | {"ema.initted": LOSS},
        "took the names that start with 'ema.ema_model.', of averaged weights; left out: 'online_model.', 'initted'",
    ),
    "transformers' wrapper of timm": (
        lambda s, o: put("timm_model.", s),
        "took the names that start with 'timm_model.'",
    ),
    "ema_pytorch's": (
        lambda s, o: put("online_model.", o) | put("ema_model.", s) | {"initted": LOSS, "step": LOSS},
        "took the names that start with 'ema_model.', of averaged weights; left out: 'online_model.', 'initted', 'step'",
    ),
}


@pytest.mark.parametrize("name", HOLDS)
def test_the_model_that_is_meant_is_found_and_the_rest_is_said(tmp_path, name):
    theirs, other, ours = shaken(vit()), vit(), vit()
    content, note = HOLDS[name]
    path = written(content(theirs.state_dict(), other.state_dict()), tmp_path / "w.pth")
    notes = load_weights(ours, path)
    assert notes == [] if note is None else notes[0].startswith(note), notes
    same_outputs(ours, theirs)


# what self-supervised training saves of an encoder, whose classifier nobody has trained
ENCODERS = {
    "MAE's": lambda s: {"model": s | {"mask_token": LOSS, "decoder_blocks.0.norm1.weight": LOSS}},
    "SimMIM's": lambda s: {"model": put("encoder.", s) | {"encoder.mask_token": LOSS, "decoder.0.weight": LOSS}},
    "DINO's": lambda s: {
        "student": put("module.backbone.", s) | {"module.head.mlp.0.weight": torch.ones(4, 4)},
        "teacher": put("backbone.", {key: value + 1 for key, value in s.items()})
        | {"head.mlp.0.weight": torch.ones(4, 4)},
    },
    "DINOv2's": lambda s: {"teacher": put("backbone.", s) | {"dino_head.last_layer.weight_g": LOSS}},
    "SwAV's": lambda s: put("module.", s) | {"module.projection_head.0.weight": LOSS, "module.prototypes.weight": LOSS},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_self_supervised_encoder_is_found_and_the_rest_is_said(tmp_path, name):
    theirs, ours = shaken(vit()), vit()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    path = written(ENCODERS[name](state), tmp_path / "w.pth")
    notes = load_weights(ours, path, "new")
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in state.items())
    assert "left out" in notes[0] and notes[-1] == "it has no classes: the classifier (head) of 5 starts fresh"
    assert load_weights(vit(), path, "file")[-1] == "it has no classifier: features only"


@pytest.mark.parametrize("make", [AveragedModel, lambda m: AveragedModel(m, use_buffers=True), ModelEmaV3])
def test_an_averaging_wrapper_itself(tmp_path, make):
    theirs, ours = shaken(vit()), vit()
    load_weights(ours, written(make(theirs).state_dict(), tmp_path / "w.pth"))
    same_outputs(ours, theirs)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda s, o: {"generator": s, "critic": o}, r"several models \('critic', 'generator'\)|'generator', 'critic'"),
        (lambda s, o: put("left.", s) | put("right.", o), r"start with 'left.', the names that start with 'right.'"),
        (
            lambda s, o: put("module.encoder_q.", s) | put("module.encoder_k.", o),
            r"'module.encoder_q.', the names that",
        ),
        (lambda s, o: {"ema": s, "swa": o}, "several models .'ema', 'swa'.*, and nothing says which one is meant"),
    ],
)
def test_one_of_several_models_is_not_guessed(tmp_path, content, words):
    path = written(content(shaken(vit()).state_dict(), vit().state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as error:
        load_weights(vit(), path)
    assert "\n" not in str(error.value)


def shards(folder, model):
    """As transformers' save_pretrained writes a model that is larger than one file."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    state = list(model.state_dict().items())
    half = len(state) // 2
    placed = {}
    for name, part in zip(names, (state[:half], state[half:]), strict=True):
        save_file(dict(part), folder / name)
        placed |= {key: name for key, _ in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def test_shards_are_read_by_their_index_and_not_one_by_one(tmp_path):
    theirs, ours = shaken(vit()), vit()
    index = shards(tmp_path, theirs)
    load_weights(ours, index)
    same_outputs(ours, theirs)
    with pytest.raises(
        UserError, match=r"is one of 2 files with parts of a model: give their index, model.safetensors.index"
    ):
        load_weights(vit(), tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"is a folder: give a file in it \(model.safetensors.index.json\)"):
        load_weights(vit(), tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors' does not exist"):
        load_weights(vit(), index)


def test_shards_of_a_variant_are_read_by_its_index(tmp_path):
    theirs, ours = shaken(vit()), vit()
    text = shards(tmp_path, theirs).read_text()
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / name).rename(tmp_path / name.replace("model-", "model.fp16-"))
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(text.replace("model-", "model.fp16-"))
    load_weights(ours, index)
    same_outputs(ours, theirs)
    with pytest.raises(UserError, match=r"give their index, model.safetensors.index.fp16.json\."):
        load_weights(vit(), tmp_path / "model.fp16-00001-of-00002.safetensors")


def test_shards_that_lack_a_tensor_of_their_index_are_named(tmp_path):
    index = shards(tmp_path, vit())
    listed = json.loads(index.read_text())
    listed["weight_map"]["other.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(
        UserError, match=r"lists 'other.weight' for 'model-00001-of-00002.safetensors', which has no such"
    ):
        load_weights(vit(), index)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../x.safetensors"}}', "\xff"]
)
def test_a_broken_index_is_one_line(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_weights(vit(), index)
    assert str(index) in str(error.value) and "\n" not in str(error.value)
