"""`python -m scalekd_ds VERB ...` is `scalekd VERB ...`."""

from scalekd_ds.commands.dispatch import main

if __name__ == "__main__":
    main()
