"""A recipe: what a user writes, one YAML file that every verb reads.

`schema` has its keys, `source` the place of every value in its text, `methods` what its names of methods stand for, `overrides` what a
command line lays over it, `mistakes` what is said of what is wrong, and `loading` puts them together; `call` makes one of a call in Python.
`settings` is what a plan is made from of it, `rows` what it learns from.
"""

from finebits.recipe.loading import Recipe
from finebits.recipe.methods import format_value
from finebits.recipe.mistakes import SYNONYMS
from finebits.recipe.schema import leaves
from finebits.recipe.source import Problem, RecipeError

__all__ = ["SYNONYMS", "Problem", "Recipe", "RecipeError", "format_value", "leaves"]
