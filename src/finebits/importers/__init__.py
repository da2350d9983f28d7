"""Configs of other tools as recipes: a file a tool, whose table says what its keys are called here."""
