"""The verbs of the `scalekd` command, one module each: they parse arguments and call the package that does the work.

This is the top layer: it may import all other packages, and none imports it.

The module of a verb is `scalekd_ds/commands/<verb>.py`, with `_` for `-`. Its `main(argv: list[str] | None = None)` takes the
arguments after the verb, or `sys.argv[1:]` if None. It raises UserError for mistakes that a user can correct, and returns an
exit status or None. A verb with options of its own has `parser()`, which returns their `argparse.ArgumentParser`, for the help
and for shell completion. Heavy modules are imported inside these functions. `launch/<verb>.py` run the same verbs as scripts.
"""
