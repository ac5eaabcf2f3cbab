"""Lists the recipes: `scalekd recipes`."""

from __future__ import annotations

from scalekd_ds.commands.parser import Parser


def parser() -> Parser:
    """The verb's options, which are --help alone."""
    return Parser("recipes", "The recipes, what each is, its models' parameters (M), multiply-adds (G) and course.")


def main(argv: list[str] | None = None) -> None:
    parser().parse_args(argv)
    from scalekd_ds.recipes.listing import print_recipes

    print_recipes()
