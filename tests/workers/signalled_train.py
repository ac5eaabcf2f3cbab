"""launch/train.py whose rank 0 signals itself at one moment: `signalled_train.py MOMENT[@STEP] SIGNAL[,SIGNAL] ...`."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time

from scalekd_ds.errors import run_cli

MOMENT, _, STEP = sys.argv[1].partition("@")
SIGNALS = [signal.Signals[name] for name in sys.argv[2].split(",")]
_sent = []


def send() -> None:
    """Sends the signals to this process, once."""
    if not _sent and os.environ.get("RANK", "0") == "0":
        _sent.append(MOMENT)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
            # signals of one kind that come together are one
            time.sleep(0.3)


def before(module: object, name: str, deaf: bool = False) -> None:
    """Sends the signals just before a function of `module` does its work, or while no Python runs in the main thread."""
    work = getattr(module, name)

    def signalled(*args, **kwargs):
        if deaf:
            import threading

            threading.Timer(0.5, send).start()
            # it lets go of the interpreter, and neither returns nor is interrupted
            libc = ctypes.CDLL(None)
            for _ in range(100):
                libc.sleep(60)
        if STEP and args[0].step + 1 != int(STEP):
            return work(*args, **kwargs)
        send()
        return work(*args, **kwargs)

    setattr(module, name, signalled)


def main() -> int | None:
    from scalekd_ds.checkpoint import saver
    from scalekd_ds.commands import train
    from scalekd_ds.evaluation import accuracy
    from scalekd_ds.training import saving, setup, trainer, validation

    moments = {
        "indexing": (setup, "read_sources"),
        "joining": (setup, "start_processes"),
        "building": (setup, "build_distiller"),
        "engine": (setup, "build_engine"),
        "resuming": (setup, "load_checkpoint"),
        "step": (trainer, "train_step"),
        "evaluating": (accuracy, "count_correct"),
        "drawing": (validation, "draw_run_pictures"),
        "saving": (saver.Saver, "_publish"),
        "finishing": (saving, "write_student"),
        "results": (trainer, "write_json"),
        "card": (trainer, "report_card"),
    }
    if MOMENT == "exit":
        atexit.register(send)
    else:
        before(*moments[MOMENT.removeprefix("deaf-")], deaf=MOMENT.startswith("deaf-"))
    return train.main([a for a in sys.argv[3:] if not a.startswith("--local_rank")])


if __name__ == "__main__":
    run_cli(main)
