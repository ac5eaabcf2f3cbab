"""What would change a view or an answer is refused by its name, with both values and what to do; all else goes."""

import json

import pytest
from written_caches import manifest_of, write_cache

from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.records import Layout
from scalekd_ds.teacher_cache.settings import adopt, check_images, settings_of
from scalekd_ds.training.finished_run import finished_run

RECIPE = ("--recipe", "swin_l-resnet50-traditional", "--data.root", "images")
LAYOUT = Layout((4, 8), "int8", 5, None)


def run(*words):
    return parse_run([str(word) for word in (*RECIPE, *words)])[0]


@pytest.fixture
def cache(tmp_path):
    return cache_of(tmp_path)


def cache_of(tmp_path, layout=LAYOUT, *words, **changes):
    manifest = manifest_of(layout, samples=8, views=4, **({"settings": settings_of(run(*words))} | changes))
    write_cache(tmp_path / "cache", manifest)
    return TeacherCache(tmp_path / "cache")


def test_a_run_takes_the_views_of_the_cache(cache):
    cfg = adopt(run("--seed", 7), cache)
    assert (cfg.data.views, cfg.data.view_seed, cfg.data.subset_seed, cfg.data.mix_by) == (4, 3, 5, "batch")
    assert cfg.seed == 7
    assert adopt(run("--data.views", 2, "--data.view_seed", 3), cache).data.views == 2


def test_a_finished_run_from_a_cache_is_not_repeated(cache, tmp_path):
    """Its file has the views of the cache, which its command line has not."""
    words = [*RECIPE, "--run.dir", str(tmp_path / "run"), "--teacher_cache", str(cache.folder)]
    trained = adopt(run(*words, "--run.resume", "auto"), cache)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(trained.as_dict()))
    (tmp_path / "run" / "results.json").write_text('{"top1": 80.0}')
    assert finished_run(words, 1, tmp_path / "logs" / "log") == {"top1": 80.0}
    # nothing was started
    assert not (tmp_path / "logs").exists()


def test_what_a_cache_does_not_depend_on_goes(cache):
    for words in (
        ("--student", "resnet18", "--student_kwargs", "{}"),
        ("--distill.weights_s3", "[0.1,0.2]", "--distill.temperature", 4, "--distill.kd_weight", 0.1),
        ("--distill.features", "false"),
        ("--global_batch_size", 512, "--micro_batch_size", 8, "--data.repeats", 2, "--data.balanced", "true"),
        ("--optim.lr", 0.5, "--run.ds_config", "zero3", "--run.teacher_placement", "sharded", "--data.threads", 3),
    ):
        assert adopt(run(*words), cache).data.views == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.views", 5), "--data.views is 5, and the teacher cache .* has 4: .*--views 5"),
        (("--data.view_seed", 4), "--data.view_seed is 4, and the views .* have 3"),
        (("--data.image_size", 192), "--data.image_size is 192, .* was made with 224: give --data.image_size 224"),
        (("--data.hflip", 0.0), r"--data.hflip is 0.0, .* made with 0.5"),
        (("--data.crop_scale", "[0.2,1]"), r"--data.crop_scale is \[0.2, 1.0\], .* made with \[0.08, 1.0\]"),
        (("--data.auto_augment", "trivial"), "--data.auto_augment is trivial, .* made with "),
        (("--data.random_erasing", 0.25), r"--data.random_erasing is 0.25, .* made with 0.0"),
        (("--data.mixup", 0.2), r"--data.mixup is 0.2, .* made with 0.0"),
        (("--teacher", "vit_base_patch16_224"), "--teacher is vit_base_patch16_224, .* made with swin_large"),
        (("--teacher", "none"), "--teacher is none, .* made with swin_large"),
        (("--teacher_image_size", 384), "--teacher_image_size is 384, .* made with 224"),
        (("--teacher_kwargs", '{"drop_rate": 0.1}'), "--teacher_kwargs is .*, .* made with "),
        (("--run.teacher_precision", "bf16"), "--run.teacher_precision is bf16, .* made with autocast"),
        (("--as_published.teacher_in_train_mode", "true"), "--as_published.teacher_in_train_mode is true"),
        (("--distill.tpp", "false"), "--distill.tpp is false, .* leave out"),
    ],
)
def test_what_would_change_a_view_or_an_answer_is_refused_by_name(cache, words, message):
    with pytest.raises(UserError, match=message) as error:
        adopt(run(*words), cache)
    assert "\n" not in str(error.value)


def test_a_cache_without_what_is_asked_is_refused(tmp_path):
    logits = cache_of(tmp_path / "a", Layout(None, "int8", 5, None), "--distill.features", "false")
    with pytest.raises(UserError, match=r"--distill.features is true, .* holds logits only"):
        adopt(run(), logits)
    assert adopt(run("--distill.features", "false"), logits)
    tokens = cache_of(tmp_path / "b", Layout((4, 8), "int8", 0, None), teacher={"num_classes": 5})
    with pytest.raises(UserError, match=r"--distill.kd_weight is 0.5, .* holds no logits"):
        adopt(run(), tokens)
    assert adopt(run("--distill.kd_weight", 0), tokens)


def test_files_of_the_same_weights_may_lie_elsewhere(tmp_path):
    cache = cache_of(tmp_path, LAYOUT, "--teacher", "a/student.safetensors", "--teacher_weights", "a.pth")
    assert adopt(run("--teacher", "b/student.safetensors", "--teacher_weights", "b.safetensors"), cache)
    with pytest.raises(UserError, match=r"--teacher_weights is pretrained, .* made with a.pth"):
        adopt(run("--teacher", "b/student.safetensors"), cache)


def test_mixing_comes_by_view_and_its_absence_is_one_however_it_is_said(tmp_path):
    mixed = cache_of(tmp_path / "a", LAYOUT, "--data.mixup", 0.8)
    assert adopt(run("--data.mixup", 0.8), mixed).data.mix_by == "view"
    plain = cache_of(tmp_path / "b")
    assert adopt(run("--data.mixup", 0.8, "--as_published.no_mixing", "true"), plain).data.mix_by == "batch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 9}, "data.train has 9 images, .* of 8: "),
        ({"digest": "e"}, "other names, labels or another order"),
        ({"files": "g"}, "other bytes in its files"),
    ],
)
def test_other_images_are_refused(cache, changes, message):
    record = {"count": 8, "digest": "d", "files": "f"}
    check_images(cache.manifest, record, run("--teacher_cache", cache.folder))
    with pytest.raises(UserError, match=message):
        check_images(cache.manifest, record | changes, run("--teacher_cache", cache.folder))
