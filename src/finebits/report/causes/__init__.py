"""What goes wrong with runs, a cause a function: it looks at a run's files, and says what it found with the evidence, or nothing."""

from finebits.report.causes.base import Case, Cause, diagnose

__all__ = ["Case", "Cause", "diagnose"]
