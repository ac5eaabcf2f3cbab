"""`python -m scalekd_ds VERB ...` is `scalekd VERB ...`."""

from scalekd_ds.commands import main

if __name__ == "__main__":
    main()
