"""The contact sheet: what is on it is what the models say, and each mistake ends in one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from forking import forked, forked_ranks
from image_fixtures import make_dataset
from launching import LIMIT, ROOT, environment
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from tiny_run import RESNET, SWIN
from torchvision import transforms
from weight_files import VIT

from scalekd_ds.checkpoint.layout import resolve_checkpoint
from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.checkpoint.shard_files import saved_weights
from scalekd_ds.commands.inspect import main
from scalekd_ds.commands.inspect import parser as parser_of
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.inspection import sheet as layout
from scalekd_ds.inspection.compose import _prediction_column, open_models
from scalekd_ds.inspection.frequencies import radial_spectrum
from scalekd_ds.inspection.images import Crop, find_images, read_image, spread_over_folders
from scalekd_ds.inspection.inspected_models import open_model
from scalekd_ds.inspection.pictures import spectrum
from scalekd_ds.inspection.predictions import correctness, crosstable, order_by_disagreement, top_classes
from scalekd_ds.inspection.projector_attention import projector_attention, restore_distiller

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["class_0", "class_1", "class_2"]


def write_model(path: Path, name: str, kwargs: dict, classes=CLASSES, **card) -> str:
    """Random weights and their card, as consolidate writes them."""
    torch.manual_seed(len(path.name))
    model = timm.create_model(name, num_classes=len(classes), **kwargs)
    plain = {"architecture": name, "model_kwargs": kwargs, "num_classes": len(classes), "classes": classes}
    pixels = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "eval_resize": None}
    write_student(path, model.state_dict(), plain | pixels | {"top1": None, "step": 0} | card)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a teacher, a distilled run on two ranks and ZeRO-2, and a baseline that is a plain file."""
    root = tmp_path_factory.mktemp("inspect")
    data = make_dataset(root / "data", train=24, val=9, classes=3, size=(32, 32))
    teacher = write_model(root / "teacher.safetensors", "swin_tiny_patch4_window7_224", SWIN)
    slim = RESNET | {"channels": [8, 16, 16, 16]}
    write_model(root / "baseline.safetensors", "resnet18", slim)
    done = forked_ranks(
        *(ROOT / "launch" / "train.py", "--recipe", "fashion-scalekd", "--data.root", data, "--run.dir", root / "run"),
        *("--data.train_images", "null", "--teacher", teacher, "--run.ds_config", "zero2"),
        *("--student_kwargs", json.dumps(slim), "--global_batch_size", 8, "--micro_batch_size", 4),
        *("--schedule.epochs", 4, "--schedule.warmup_epochs", 0, "--data.eval_batch_size", 9),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def models_of(place, *more):
    args = parser_of().parse_args([str(place / "run"), str(place / "data"), *more])
    return open_models(args)


def test_the_launch_script_draws_a_runs_images_and_counts_right_answers(place, tmp_path):
    out = tmp_path / "sheet.png"
    baseline = place / "baseline.safetensors"
    done = forked(ROOT / "launch" / "inspect.py", place / "run", place / "data", "--baseline", baseline, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}: 8 of 9 images" in done.stdout and "left out" not in done.stdout
    for role in ("student", "teacher", "baseline"):
        assert re.search(rf"^{role}: \d of 8 shown right$", done.stdout, re.M)
    picture = Image.open(out).convert("RGB")
    # name, image, three maps, three queries, three answers
    columns = layout._NAME + 7 * layout._PICTURE + 3 * layout._PREDICTION + 12 * layout._GAP
    rows = layout._HEAD + 8 * (layout._PICTURE + layout._GAP) + layout._FOOT
    assert picture.size == pytest.approx((110 * columns, 110 * rows), abs=2)
    # the second column's cells are the images
    shown = spread_over_folders(find_images([str(place / "data")]), 8)
    for row, path in enumerate(shown[:8]):
        x = 110 * (layout._NAME + 2 * layout._GAP + layout._PICTURE / 2)
        y = 110 * (layout._HEAD + row * (layout._PICTURE + layout._GAP) + layout._PICTURE / 2)
        box = picture.crop((int(x - 50), int(y - 50), int(x + 50), int(y + 50))).resize((1, 1), Image.Resampling.BOX)
        middle = read_image(path, Crop(32, 32, "bicubic"))[:, 5:27, 5:27].mean((1, 2)) * 255
        assert box.getpixel((0, 0)) == pytest.approx(middle.tolist(), abs=12)


def test_projectors_come_whole_from_the_shards_of_two_ranks(place):
    checkpoint = resolve_checkpoint(place / "run")
    student = load_file(checkpoint / "student.safetensors")
    saved = saved_weights(checkpoint, 2, "student.")
    parameters = {k: v for k, v in student.items() if "running_" not in k and "num_batches" not in k}
    assert {k.removeprefix("student.") for k in saved} == set(parameters)
    assert all(torch.equal(saved[f"student.{k}"].view_as(v), v) for k, v in parameters.items())

    models = models_of(place)
    cfg = models.student.source.cfg
    distiller = restore_distiller(models.student.network, models.teacher.network, cfg, checkpoint, (32, 32))
    assert distiller.projectors["s3"].spatial.norm.num_batches_tracked == 12
    # trained projectors bring the student nearer to its teacher than fresh ones do
    images = torch.stack([read_image(p, Crop(32, 32, "bicubic")) for p in find_images([str(place / "data" / "train")])])
    torch.manual_seed(0)
    fresh = ScaleKD(models.student.network, models.teacher.network, image_size=32, verbose=False, **vars(cfg.distill))
    pixels = models.student.normalise(images)
    with torch.no_grad():
        losses, others = distiller(pixels), fresh.eval()(pixels)
    for term in ("spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4"):
        assert losses[f"loss/{term}"] < others[f"loss/{term}"]

    focus = projector_attention(distiller, models.student.run(images).student_output, 3)
    assert focus.stage == "s4" and focus.grid == (4, 4) and focus.weights.shape == (24, 3, 4, 4)
    assert torch.allclose(focus.weights.sum((-2, -1)), torch.ones(24, 3))
    # the last stage's queries come from the image
    assert (focus.weights[0] - focus.weights[1]).abs().max() > 1e-6


def test_answers_are_those_of_timm_and_torchvision(place):
    (subject,) = [models_of(place, "--teacher", "none").student]
    card = json.loads((place / "run" / "student.json").read_text())
    model = timm.create_model(card["architecture"], num_classes=3, **card["model_kwargs"]).eval()
    model.load_state_dict(load_file(place / "run" / "student.safetensors"))
    path = find_images([str(place / "data")])[4]
    steps = [
        transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
    ]
    pixels = transforms.Compose(steps)(Image.open(path).convert("RGB"))
    assert torch.equal(read_image(path, Crop(32, 36, "bicubic")), pixels)
    with torch.no_grad():
        wanted = model(transforms.Normalize(card["mean"], card["std"])(pixels)[None]).softmax(-1)[0]
    seen = subject.run(pixels[None])
    classes, values = top_classes(seen.logits)
    assert classes[0].tolist() == wanted.argsort(descending=True).tolist()
    assert values[0].tolist() == pytest.approx(wanted.sort(descending=True).values.tolist(), rel=1e-4)
    (row,) = _prediction_column(subject, subject, seen, [1]).rows
    assert [(name, right) for name, _, right in row] == [(CLASSES[c], c == 1) for c in classes[0].tolist()]


def test_the_teachers_map_is_its_target(place):
    teacher = models_of(place).teacher
    pixels = torch.rand(2, 3, 32, 32)
    tokens = teacher.network.targets((pixels - 0.5) / 0.25).tokens
    assert torch.allclose(teacher.run(pixels).maps.flatten(2).transpose(1, 2), tokens, atol=1e-6)


def test_picking_lost_images_counts_how_often_each_model_is_right(place, tmp_path, capsys):
    out = tmp_path / "lost.png"
    run, baseline = str(place / "run"), str(place / "baseline.safetensors")
    main([run, str(place / "data"), "--baseline", baseline, "--pick", "lost", "--images", "1", "--out", str(out)])
    text = capsys.readouterr().out
    counts = re.search(
        r"of 9 images: student and baseline right (\d), student alone (\d), baseline alone (\d), neither (\d)", text
    )
    assert sum(map(int, counts.groups())) == 9
    student, other = open_model(run, "student"), open_model(baseline, "baseline")
    images = [(p, read_image(p, Crop(32, 32, "bicubic"))) for p in find_images([str(place / "data")])]
    found = correctness([student, other], images, lambda p: CLASSES.index(p.parent.name), 4)
    assert crosstable(found, "baseline", 1) in text


def test_images_that_the_student_alone_gets_wrong_come_first():
    answer = {"a": [True, True], "b": [False, False], "c": [False, True], "d": [True, False], "e": [False, True]}
    found = [(Path(folder) / name, right) for name, right in answer.items() for folder in ("x", "y")]
    order = [str(p) for p in order_by_disagreement(found)]
    assert order == ["x/c", "y/c", "x/e", "y/e", "x/b", "y/b", "x/a", "y/a", "x/d", "y/d"]


def test_images_are_spread_over_folders():
    paths = [Path(folder) / f"{i}.jpg" for folder in ("a", "b") for i in range(6)]
    assert [str(p) for p in spread_over_folders(paths, 4)[:4]] == ["a/0.jpg", "b/0.jpg", "a/3.jpg", "b/3.jpg"]
    assert sorted(spread_over_folders(paths, 4)) == paths


def test_plain_timm_models_answer_with_imagenets_names(place, tmp_path, capsys):
    """ImageNet's names for answers, its synsets for folders; a teacher beside it, and no projectors to show."""
    synset = ImageNetInfo("imagenet-1k").label_names()[7]
    (tmp_path / synset).mkdir()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / synset / "x.png")
    models = ("--weights", "none", "--teacher", "vit_tiny_patch16_224", "--teacher-weights", "none", "--size", "64")
    out = tmp_path / "plain.png"
    main(["resnet18", str(tmp_path / "*" / "*.png"), *models, "--out", str(out)])
    text = capsys.readouterr().out
    assert "student: resnet18: ResNet, 11.69 M" in text and re.search(r"student: [01] of 1 shown right", text)
    assert "left out" not in text and Image.open(out).size[0] > 900
    subject = open_model("resnet18", "student", "none")
    assert subject.classes[7] == "cock" and subject.folder_names[7] == synset and subject.size is None


def test_what_cannot_be_shown_is_said(place, tmp_path, capsys):
    """A damaged file is named and skipped; a teacher of other classes and shape is shown, and costs the attention."""
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    good = find_images([str(place / "data")])[0]
    more = ("--teacher", "resnet18", "--teacher-weights", "none", "--out", str(tmp_path / "out.png"))
    main([str(place / "run"), str(tmp_path / "bad.jpg"), str(good), *more])
    text = capsys.readouterr().out
    assert f"skipped {tmp_path / 'bad.jpg'}: cannot identify image file" in text
    assert "the teacher (resnet18) has 1000 classes and the student 3: its answers are its own" in text
    assert "attention left out: the teacher (resnet18) is not one that the projectors were made for" in text
    assert "1 of 2 images" in text
    main([str(place / "run"), str(good), "--size", "64", "--out", str(tmp_path / "out.png")])
    assert (
        "attention left out: the checkpoint's projectors are of another student, teacher or size"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{run} nowhere", "no images found at 'nowhere': give a folder, files or a quoted glob of .jpg"),
        ("runs/nothing {data}", "'runs/nothing' does not exist: give a run's folder"),
        ("{data} {data}", "holds no checkpoint"),
        ("resnet188 {data}", "unknown timm model 'resnet188'. Did you mean 'resnet18'"),
        ("{run} {readme}", "none of the 1 images can be read"),
        (
            "{run} {data} --baseline resnet18 --baseline-weights none",
            "the baseline (resnet18) has 1000 classes and the",
        ),
        (
            "{run} {data} --teacher vit_tiny_patch16_224",
            "pretrained weights of vit_tiny_patch16_224 could not be loaded",
        ),
        ("{run} {data} --pick lost", "give one as --baseline"),
        ("{run} {data} --images 0", "--images is 0: it must be at least 1"),
        ("{run} {data} --size 4", "--size is 4: it must be at least 8 pixels"),
        ("{run} {data} --out x.jpg", "--out is 'x.jpg': it must end in .png"),
        ("{run} {data} --out {data}", "must end in .png"),
        ("{run} {data} --of-run ema", "holds no ema weights"),
        ("mobilenetv3_small_050 {data} --weights none --size 32 --out {readme}/x.png", "which cannot be written"),
        ("{run}", "the following arguments are required: images"),
    ],
)
def test_a_mistake_is_named(place, arguments, words):
    names = {"run": place / "run", "data": place / "data", "readme": ROOT / "README.md"}
    with pytest.raises(UserError) as error:
        main([word.format(**names) for word in arguments.split()])
    assert words in str(error.value)


def test_a_baseline_of_other_classes_is_refused(place, tmp_path):
    other = write_model(tmp_path / "other.safetensors", "resnet18", {}, ["class_0", "class_1", "zebra"])
    with pytest.raises(UserError, match=r"different classes: .*the first 'zebra': a baseline must answer"):
        models_of(place, "--baseline", other)


@pytest.mark.parametrize("cycles", [0.5, 1.0, 3.0])
def test_the_curve_of_one_wave_has_one_peak(cycles):
    places = (torch.arange(8) + 0.5) / 8
    wave = torch.cos(2 * torch.pi * cycles * places)[None, None, :, None].expand(1, 2, 8, 6)
    frequencies, powers = radial_spectrum(spectrum(wave))
    assert frequencies == [k / 2 for k in range(8)]
    assert frequencies[powers.index(max(powers))] == cycles
    # everything of one ring, whose mean is over its cells
    assert sum(p > 1e-12 for p in powers) == 1


def test_scripts_beside_inspect_py_get_pythons_own_inspect():
    """Python puts launch/ first on the path of every script in it."""
    code = "import sys; sys.path.insert(0, 'launch'); import dataclasses, inspect; "
    code += "print(inspect.signature(lambda a, b=1: 0), inspect.__file__, inspect is sys.modules['inspect'])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    signature, file, same = done.stdout.rsplit(maxsplit=2)
    assert (signature, same) == ("(a, b=1)", "True") and "launch" not in file
    scripts = sorted((ROOT / "launch").glob("*.py"))
    started = [
        subprocess.Popen(
            [sys.executable, s, "--help"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for s in scripts
    ]
    for script, process in zip(scripts, started, strict=True):
        out = process.communicate(timeout=LIMIT)[0].decode()
        assert process.returncode == 0 and "usage:" in out, (script, out)


def test_the_documents_commands_run(place, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "inspect.md").read_text()
    commands = re.findall(r"^    scalekd inspect (.*)$", text, re.M)
    assert len(commands) == 4
    files = {
        "runs/quickstart/scalekd-seed0/student.safetensors": place / "run" / "student.safetensors",
        "runs/quickstart/scalekd-seed0": place / "run",
        "runs/quickstart/ce-seed0": place / "baseline.safetensors",
        "runs/fashion-mnist": place / "data",
    }
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command, comments=True)
        arguments = [str(files.get(word, word)) for word in words]
        # what downloads is marked, and is only read
        if "# downloads" in command:
            parser_of().parse_args(arguments)
            continue
        main(arguments)
        assert "wrote" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inspect.png", "plain.png"]


@pytest.mark.parametrize("size", [16, 48])
def test_a_vit_is_looked_at_in_another_size(tmp_path, size, capsys):
    """Its positions are those of one grid."""
    data = make_dataset(tmp_path / "data", train=1, val=6, classes=3, size=(32, 32))
    model = write_model(tmp_path / "vit.safetensors", "vit_tiny_patch16_224", VIT)
    main([model, str(data), "--size", str(size), "--out", str(tmp_path / "sheet.png")])
    assert "resized pos_embed" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()
