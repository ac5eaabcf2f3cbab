"""The verbs of the `scalekd` command, one module each.

A verb lives in `scalekd_ds/commands/<verb with _ for ->.py` and has `main(argv: list[str] | None = None)`: the arguments
after the verb, `sys.argv[1:]` where None; it raises UserError for what a user can get wrong, and returns an exit status or
None. Where the verb has options of its own, `parser()` returns their `argparse.ArgumentParser`: the help, and what a shell
completes. Modules import what is heavy inside these functions. `launch/<verb>.py` are the same verbs as files.
"""
