"""Data: rows with their line numbers, tokens with the labels they are trained on, and the gate that looks at both before a run."""
