"""Trains a few steps, then writes the engine's own logits on the validation images and a checkpoint."""

import torch
from deepspeed import comm as dist
from ranks import own_arguments
from safetensors.torch import save_file

from scalekd_ds.engine.gather import synchronise_buffers
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training import trainer
from scalekd_ds.training.validation import student_to_evaluate
from scalekd_ds.training.watch import Watch


@torch.no_grad()
def main() -> None:
    out, *args = own_arguments()
    cfg, _ = parse_run(args)
    run = trainer.build(cfg)
    batches = iter(run.train_loader)
    run.engine.train()
    with torch.enable_grad():
        for _ in range(4):
            trainer.train_step(run, batches)
            run.step += 1
    synchronise_buffers(run.distiller)
    student = student_to_evaluate(run).eval()
    # every rank sees all images, as launch/evaluate.py does
    run.val_loader.shard = type(run.val_loader)(
        run.val_loader.source,
        cfg.data,
        cfg.data.eval_batch_size,
        0,
        1,
        run.device,
        run.val_loader.mean,
        run.val_loader.std,
    ).shard
    logits = torch.cat([student(images) for images, _ in run.val_loader])
    run.engine.train()
    trainer.begin_checkpoint(run, Watch(run))
    run.saver.finish()
    save_file({"logits": logits.contiguous()}, f"{out}.rank{dist.get_rank()}")
    dist.barrier()


main()
