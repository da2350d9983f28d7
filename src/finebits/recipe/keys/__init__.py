"""The sections of a recipe: their keys, the types and defaults of these, and what they mean."""
