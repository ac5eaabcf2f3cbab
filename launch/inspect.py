#!/usr/bin/env python3
"""Contact sheet of attention, feature maps, predictions and frequencies: `launch/inspect.py CKPT IMAGES --out PNG`.

Python puts the folder of a script first on its path, so `import inspect` in any script of this folder finds this file.
It then loads the standard library's module of that name in its place.
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

    here = os.path.dirname(os.path.realpath(__file__))

    def is_here(folder: str) -> bool:
        try:
            return os.path.realpath(folder) == here
        except FileNotFoundError:
            # a relative one, such as the name of a hook that editable installs add, where the current folder was deleted
            return False

    other_folders = [folder for folder in sys.path if not is_here(folder)]
    spec = PathFinder.find_spec("inspect", other_folders)
    # an import statement returns what sys.modules has when the import ends
    sys.modules["inspect"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
