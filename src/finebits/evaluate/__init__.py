"""How good a model is: loss, divergence from the unquantized one, exact answers, samples."""
