"""DeepSpeed's launcher, as `scalekd train --gpus` and `--hostfile` start it: with its own arguments, and without chatter."""

from __future__ import annotations

import os

from scalekd_ds.commands.quiet import without_chatter


def main() -> None:
    """Runs the launcher; it ends this process with its status."""
    without_chatter()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    if get_accelerator().device_name() == "cpu":
        # the processes that it starts on this machine would look for a GPU again, and each would say that there is none
        os.environ["DS_ACCELERATOR"] = "cpu"
    runner.main()


if __name__ == "__main__":
    main()
