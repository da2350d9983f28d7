"""What finebits raises where a person is to read it. Whatever is no FinebitsError is a fault of the program, or of another library.

Each is also the exception of Python that its caller expects: bad values are ValueErrors, and so on. Errors of one subject (`DataError`,
`Occupied`, …) derive from these beside what raises them, where they need an exit code, a hint or findings of their own.
"""

from __future__ import annotations

from typing import Any


class FinebitsError(Exception):
    """A sentence for the user: what was wanted, what came, where, and what to do. `code` is the exit code of a command that ends with it,
    `hint` what to do where the sentence leaves that out."""

    code: int = 1
    hint: str = ""

    def data(self) -> dict[str, Any]:
        """More of it for programs, in JSON's values."""
        return {}


class Invalid(FinebitsError, ValueError):
    """Something that was given cannot be used."""


class WrongType(FinebitsError, TypeError):
    """Something of another kind was given."""


class Missing(FinebitsError, KeyError):
    """There is nothing of that name."""

    __str__ = Exception.__str__  # KeyError would show the sentence in quotes


class Unsupported(FinebitsError, NotImplementedError):
    """An operation that a value of finebits does not have."""


class Failed(FinebitsError, RuntimeError):
    """Something could not be done, through no fault of what was given."""


class OutOfTime(FinebitsError, TimeoutError):
    """The time that was allowed is over."""
