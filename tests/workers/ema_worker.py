"""Two ranks: the student's average in the cases that are named against a plain loop, and through a checkpoint. Prints JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from deepspeed import comm as dist
from ranks import backward, begin, common_folder, engine_of, loss_of, tell
from torch import nn

from scalekd_ds.checkpoint.load import load_checkpoint
from scalekd_ds.checkpoint.manifest import verify
from scalekd_ds.checkpoint.save import save_checkpoint
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.engine.gather import student_state
from scalekd_ds.engine.processes import job_store
from scalekd_ds.errors import UserError
from scalekd_ds.training.ema import StudentEma, start_ema

DECAY, STEPS, SAVED, LR, MOMENTUM = 0.7, 6, 3, 0.1, 0.9


class Student(nn.Module):
    """Odd sizes, so that shards cut through layers; BatchNorm, a frozen parameter, a tied one, an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2, self.head = (
            nn.Linear(13, 37),
            nn.BatchNorm1d(37),
            nn.Linear(37, 37),
            nn.Linear(37, 11),
        )
        self.tied = nn.Linear(37, 37)
        self.tied.weight = self.fc2.weight
        self.scale = nn.Parameter(torch.full((37,), 0.5), requires_grad=False)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.fc1(x)))
        return self.head(self.scale * self.tied(self.fc2(x)))


class Distiller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.projector = Student(), nn.Linear(11, 5)

    def forward(self, x):
        return self.projector(self.student(x))


def batches():
    """(x, y) of 8 rows a step, 4 of them each rank's."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 13, generator=generator), torch.randn(8, 5, generator=generator)) for _ in range(STEPS)]


def expected() -> dict[str, torch.Tensor]:
    """One process, no DeepSpeed: two replicas on half a batch each, gradients averaged, SGD; averages in float64."""
    replicas = [Distiller(), Distiller()]
    optimizers = [torch.optim.SGD(r.parameters(), lr=LR, momentum=MOMENTUM) for r in replicas]
    averages = [None, None]
    for step, (x, y) in enumerate(batches(), start=1):
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            rows = slice(4 * rank, 4 * rank + 4)
            loss_of(replica(x[rows]), y[rows]).backward()
        for a, b in zip(*(r.parameters() for r in replicas), strict=True):
            if a.grad is not None:
                mean = (a.grad + b.grad) / 2
                a.grad, b.grad = mean.clone(), mean.clone()
        for rank, replica in enumerate(replicas):
            optimizers[rank].step()
            now = {k: v.detach().double() for k, v in replica.student.state_dict().items()}
            old = averages[rank] or now
            averages[rank] = {k: DECAY * old[k] + (1 - DECAY) * now[k] for k in now}
        if step == SAVED:
            # a checkpoint makes live statistics their mean over ranks, and the averaged ones too
            for name in ("running_mean", "running_var"):
                live = [getattr(r.student.norm, name) for r in replicas]
                mean = (live[0] + live[1]) / 2
                for buffer in live:
                    buffer.copy_(mean)
                kept = (averages[0][f"norm.{name}"] + averages[1][f"norm.{name}"]) / 2
                for average in averages:
                    average[f"norm.{name}"] = kept
    result = {k: (averages[0][k] + averages[1][k]) / 2 for k in averages[0]}
    return result | {"norm.num_batches_tracked": replicas[0].student.norm.num_batches_tracked}


def start(zero: dict):
    module = Distiller()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR, momentum=MOMENTUM)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    return engine_of(module, optimizer, zero, config)


def train(engine, ema: StudentEma, data) -> None:
    for x, y in data:
        backward(engine, x, y)
        engine.step()
        ema.update()


def case(zero: dict, oracle: dict[str, torch.Tensor], folder: Path) -> dict:
    data = batches()
    engine = start(zero)
    ema = start_ema(engine, DECAY, None)
    train(engine, ema, data[:SAVED])
    state = {"step": SAVED, "world_size": 2, "zero_stage": zero["stage"]}
    saver = Saver(folder, 1, 0, job_store())
    saved = save_checkpoint(engine, saver, state, {}, (ema.state(), {"weights": "ema"}))
    saver.finish()
    # keys of shards have an offset and a slash
    copied = torch.tensor(float(sum("/" not in key for key in saver.copies.keys())))  # noqa: SIM118
    dist.broadcast(copied, 1)
    train(engine, ema, data[SAVED:])
    whole = ema.state()
    held = torch.tensor(float(sum(average.numel() for average in ema._averages)))
    dist.all_reduce(held)

    verify(saved)
    resumed = start(zero)
    load_checkpoint(resumed, saved)
    again = start_ema(resumed, DECAY, saved)
    train(resumed, again, data[SAVED:])
    other = again.state()
    errors = [refusal(resumed, 0.0, saved), refusal(resumed, DECAY, folder)]
    weights = student_state(engine.module)
    return {
        "errors": errors,
        "error": largest_difference(whole, oracle),
        "distance": largest_difference(weights, oracle),
        "names": list(whole) == list(oracle),
        "bits": all(
            torch.equal(whole[k].view(-1).view(torch.uint8), other[k].view(-1).view(torch.uint8)) for k in whole
        ),
        "held": int(held.item()),
        "copied": int(copied.item()),
    }


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max((ours[k].double() - theirs[k].double()).abs().max().item() for k in theirs)


def refusal(engine, decay: float, folder: Path) -> str:
    try:
        start_ema(engine, decay, folder)
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    arguments = begin(parser)
    folder, oracle = common_folder(), expected()
    cases = {f"zero{stage}": {"stage": stage} for stage in range(3)}
    cases["zero3"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    cases["zero3 persistent"] = {"stage": 3, "stage3_param_persistence_threshold": 100_000}
    # several flat shards a rank
    cases["zero3 sub-groups"] = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 700}
    cases["zero2 round robin"] = {"stage": 2, "round_robin_gradients": True}
    tell({name: case(cases[name], oracle, folder / name.replace(" ", "_")) for name in arguments.cases})


if __name__ == "__main__":
    main()
