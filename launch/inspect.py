#!/usr/bin/env python3
"""Contact sheet of attention, feature maps, predictions and frequencies: `launch/inspect.py CKPT IMAGES --out PNG`.

Python puts the folder of a script first on its path, so for every script beside it this file is what `import inspect` finds.
It then steps aside for the standard library's module of that name.
"""

if __name__ == "__main__":
    from scalekd_ds.commands.inspect import main
    from scalekd_ds.errors import run_cli

    run_cli(main)
elif __name__ == "inspect":
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    elsewhere = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
    spec = PathFinder.find_spec("inspect", elsewhere)
    # an import returns what stands in sys.modules at its end
    sys.modules["inspect"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
