"""Recipes: the text of a run, and the method that is built of it once."""

from bitpress.recipes.choice import choose_method
from bitpress.recipes.kinds import KINDS
from bitpress.recipes.layer import LayerMethod, Setting
from bitpress.recipes.method import Method, Named, build_method
from bitpress.recipes.named_recipes import NAMED_RECIPES, NamedRecipe
from bitpress.recipes.parts import make_part, settings_of, spelled
from bitpress.recipes.recipe import DEFAULT_QUANTIZER, OUTER, Calibration, Override, Recipe
from bitpress.recipes.text import dump_recipe, load_recipe, make_method, make_recipe, told_budget, told_overrides, told_weights

__all__ = [
    "DEFAULT_QUANTIZER",
    "KINDS",
    "NAMED_RECIPES",
    "OUTER",
    "Calibration",
    "LayerMethod",
    "Method",
    "Named",
    "NamedRecipe",
    "Override",
    "Recipe",
    "Setting",
    "build_method",
    "choose_method",
    "dump_recipe",
    "load_recipe",
    "make_method",
    "make_part",
    "make_recipe",
    "settings_of",
    "spelled",
    "told_budget",
    "told_overrides",
    "told_weights",
]
