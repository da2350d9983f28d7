"""What finebits raises where a person is to read it. Whatever is no FinebitsError is a fault of the program, or of another library.

Each is also the exception of Python that its caller expects: bad values are ValueErrors, and so on. Errors of one subject (`DataError`,
`Occupied`, …) derive from these beside what raises them, where they need an exit code, a hint or findings of their own.
"""

from __future__ import annotations

from typing import Any


class FinebitsError(Exception):
    """A sentence for the user: what was wanted, what came, where, and what to do. `code` is the exit code of a command that ends with it,
    `hint` what to do where the sentence leaves that out.

    >>> error = fb.FinebitsError("rank is 0; it must be at least 1")
    >>> str(error), error.code, error.hint, error.data()
    ('rank is 0; it must be at least 1', 1, '', {})
    """

    code: int = 1
    hint: str = ""

    def data(self) -> dict[str, Any]:
        """More of it for programs, in JSON's values.

        >>> from finebits.recipe import RecipeError
        >>> RecipeError([]).data()
        {'problems': []}
        """
        return {}


class Invalid(FinebitsError, ValueError):
    """Something that was given cannot be used.

    >>> isinstance(Invalid("…"), ValueError), Invalid.code
    (True, 1)
    """


class WrongType(FinebitsError, TypeError):
    """Something of another kind was given.

    >>> fb.VQ().levels()
    Traceback (most recent call last):
        ...
    finebits.errors.WrongType: VQ has codebooks that belong to a weight, and no table of levels: decode with its scales
    """


class Missing(FinebitsError, KeyError):
    """There is nothing of that name.

    >>> str(Missing("the model has no module 'q'")), str(KeyError("q"))
    ("the model has no module 'q'", "'q'")
    """

    __str__ = Exception.__str__  # KeyError would show the sentence in quotes


class Unsupported(FinebitsError, NotImplementedError):
    """An operation that a value of finebits does not have.

    >>> fb.quantize(torch.ones(2, 64), fb.NF(4)) + 1
    Traceback (most recent call last):
        ...
    finebits.errors.Unsupported: QTensor has no aten.add.Tensor; call .dequantize() if a dense copy is really meant
    """


class Failed(FinebitsError, RuntimeError):
    """Something could not be done, through no fault of what was given.

    >>> isinstance(Failed("…"), RuntimeError), Failed.code
    (True, 1)
    """


class WrongUse(Invalid):
    """A command, or a recipe, asks for what cannot be done, whatever the files hold.

    >>> WrongUse("…").code
    2
    """

    code = 2


class NoRun(WrongUse):
    """A path was named as a run, and is none.

    >>> NoRun.of("here").code, str(NoRun.of("here"))
    (2, 'here is no run of finebits: give the output_dir of a recipe (finebits runs ls lists those there are)')
    """

    @classmethod
    def of(cls, path: object) -> NoRun:
        return cls(f"{path} is no run of finebits: give the output_dir of a recipe (finebits runs ls lists those there are)")


class OutOfTime(FinebitsError, TimeoutError):
    """The time that was allowed is over.

    >>> isinstance(OutOfTime("…"), TimeoutError)
    True
    """


def out_of_memory(error: BaseException) -> bool:
    """Does an exception say that memory has run out, whatever its class?

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("CUDA out of memory")), out_of_memory(RuntimeError("no"))
    (True, True, False)
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator: can't allocate memory" in text or "CUDA out of memory" in text)
