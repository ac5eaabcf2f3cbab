"""When a checkpoint is published: once every rank has written its files."""

import subprocess
import sys
from pathlib import Path

import pytest
from forking import forked, forked_ranks
from launching import LIMIT, ROOT, WORKERS, environment, result_of


def test_a_second_run_in_the_same_ranks_waits_for_the_slowest_one_too(tmp_path):
    """The first run's answers, which stay in the job's store, are not taken for the second's."""
    whole = ["rank0", "rank1"]
    assert result_of(forked_ranks(WORKERS / "saver_worker.py", tmp_path)) == {"first": whole, "second": whole}


def saved_weights_are_those_of_their_step(accelerator: str, stage: int, script: Path) -> None:
    code = f"""
import sys, tempfile
from pathlib import Path
sys.path[:0] = [{str(WORKERS)!r}, {str(ROOT / "tests" / "helpers")!r}]
import torch
from safetensors.torch import load_file
from scalekd_ds.checkpoint.save import save_checkpoint
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.engine.gather import student_state
from scalekd_ds.engine.processes import end_processes, start_processes
from ema_worker import batches, start
from ranks import backward
device = start_processes()
assert device.type == {accelerator!r}
engine = start({{"stage": {stage}}})
saver = Saver(Path(tempfile.mkdtemp()), 100, 0)
expected = {{}}
data = [(x.to(device), y.to(device)) for x, y in batches()] * 5
for step, (x, y) in enumerate(data):
    backward(engine, x, y)
    saver.wait_copied()
    engine.step()
    if device.type == "cuda":
        # the update is queued behind this, and the checkpoint begins before it is done
        torch.cuda._sleep(100_000_000)
    now = {{name: tensor.clone() for name, tensor in student_state(engine.module).items()}} if step % 2 else None
    folder = save_checkpoint(engine, saver, {{"step": step, "world_size": 1, "zero_stage": {stage}}}, {{}})
    expected[folder] = now
# the last is compared with what the engine has
expected[folder] = student_state(engine.module)
saver.finish()
for folder, weights in expected.items():
    if weights is not None:
        saved = load_file(folder / "student.safetensors")
        assert weights.keys() == saved.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, saved[name]), (folder, name)
end_processes()
print("compared", len(expected))
"""
    if accelerator == "cuda":
        env = environment()
        env.pop("DS_ACCELERATOR")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=LIMIT)
    else:
        script.write_text(code)
        done = forked(script)
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("stage", [1, 3])
def test_steps_go_on_while_weights_are_saved(stage, tmp_path):
    saved_weights_are_those_of_their_step("cpu", stage, tmp_path / "saves.py")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_go_on_while_weights_of_a_gpu_are_saved(stage, tmp_path):
    pytest.importorskip("deepspeed")
    saved_weights_are_those_of_their_step("cuda", stage, tmp_path / "saves.py")
