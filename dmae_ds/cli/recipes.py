"""`dmae-ds recipes`: arguments; torch is not imported, and for the list and a recipe pydantic neither."""

from __future__ import annotations

import argparse


def add_recipes(subcommands) -> None:
    """Add `recipes` to the root parser."""
    recipes = subcommands.add_parser(
        "recipes", help="list the shipped recipes, show one, or list every key with its default and meaning"
    )
    recipes.add_argument(
        "name", nargs="?", metavar="NAME", help="show this recipe; with --all a word to search for"
    )
    recipes.add_argument(
        "--all",
        action="store_true",
        help="every key of a recipe: default, choices, meaning; with NAME only the lines that contain it",
    )
    recipes.set_defaults(command=_recipes)


def _recipes(args: argparse.Namespace) -> None:
    if args.all:
        from dmae_ds.config.describe import all_keys

        print(all_keys(args.name))
        return
    from dmae_ds.config.shipped import recipe_list, recipe_text

    print(recipe_list() if args.name is None else recipe_text(args.name))
