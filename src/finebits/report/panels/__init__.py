"""The panels of the page, one a file: `panel(run)` is None where the run has nothing to show there."""
