"""What is run, as far as memory asks: the levers, what was counted of the rows, and how the start is found.

A lever is a setting of training that changes what it holds, and how fast it is, and not what is learned by it in the end. What the rows are like
is no lever, though it depends on some of them; neither is how a start is calibrated and refined. The output head in 8 bits is pulled like a
lever, and is a matrix of the menu (marked in `plan.costs`) where it may be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.optim import base as optimizers

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
PULLS = ("micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings")
TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "loss_chunk", "optim")
CHANGED = (*TRAINING, "embeddings")
LEAST_CHUNK = 32
# Rough: they put levers into an order and predict no time. Checkpointing computes the forward pass again, a third of a step's work.
SLOWER = {"checkpointing": 1.33, "halved micro-batch": 1.02, "halved chunk": 1.01, "optim": 1.01, "embeddings": 1.01}


@dataclass(frozen=True)
class Levers:
    """How a model is held and trained.

    >>> fb.Levers(dtype="bfloat16", compute="float32").inner  # bytes of a number inside of a block
    4
    """

    dtype: str = "float32"
    compute: str | None = None  # what blocks compute in, where it is not what they are held in
    device: str = "cpu"
    embeddings: str = "device"  # "cpu": in host memory, beside a device that has its own
    attn_implementation: str = "auto"  # what transformers picks by itself, until a plan of a model has looked
    max_length: int = 512
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    loss_chunk: int = 256  # tokens that have logits at a time
    optim: str | optimizers.Optimizer = "adamw_torch"  # by its name where its settings are its own
    dropout: float = 0.0
    together: int | None = None  # rows that one pass needs together, where it is more than one
    positions: int | None = None  # tokens of a padded row at most, where the model's table of positions ends

    @property
    def width(self) -> int:
        """Bytes of a number as it is held.

        >>> fb.Levers().width, fb.Levers(dtype="bfloat16").width
        (4, 2)
        """
        return WIDTHS[self.dtype]

    @property
    def inner(self) -> int:
        """Bytes of a number inside of a block, which may be wider than what is held between two (finebits.arithmetic).

        >>> fb.Levers(dtype="bfloat16").inner, fb.Levers(dtype="bfloat16", compute="float32").inner
        (2, 4)
        """
        return WIDTHS[self.compute or self.dtype]

    @property
    def rounding(self) -> int:
        """What the widths of batches are padded to a multiple of: the CPU's library keeps code for every shape of 16-bit product that it met.

        Where the positions of the model end, it is small enough for no row to be padded past them.

        >>> fb.Levers().rounding, fb.Levers(dtype="bfloat16").rounding, fb.Levers(device="cuda").rounding
        (8, 64, 1)
        >>> fb.Levers(dtype="bfloat16", max_length=1000, positions=1000).rounding
        8
        """
        most = 1 if self.device != "cpu" else 64 if self.inner < 4 else 8
        while most > 1 and self.positions is not None and -(-self.max_length // most) * most > self.positions:
            most //= 2
        return most

    def padded(self, length: int) -> int:
        """A row's length once its batch is padded.

        >>> fb.Levers().padded(100), fb.Levers(dtype="bfloat16").padded(100)
        (104, 128)
        """
        return -(-length // self.rounding) * self.rounding


@dataclass(frozen=True)
class Counted:
    """What was counted of the rows, where there were any, and measured of the process, where it was probed."""

    # by rows a batch: {"worst": [[tokens, trained, widths met by then(, 1: in the first step alone)], …], "widths": how many, …}
    batches: Mapping[str, Any] | None = None
    lengths: Sequence[Sequence[int]] | None = None  # a histogram of the training rows: [up to tokens, rows]
    scored: Sequence[int] | None = None  # of the held-out rows' largest batch: rows, tokens, labels
    runtime: int | None = None  # bytes that the process holds beside tensors
    evaluated: bool | None = None  # are held-out rows scored while training, beside the optimizer's state?
    routed: bool | None = None  # are there matrices that a batch's tokens are shared out among, as many to each as it happens?

    def of(self, rows: int) -> Mapping[str, Any]:
        """What was counted of batches of so many rows; empty where nothing was.

        >>> counted = Counted({"4": {"widths": 3}})
        >>> counted.of(4), counted.of(8)
        ({'widths': 3}, {})
        """
        return (self.batches or {}).get(str(rows), {})


@dataclass(frozen=True)
class Start:
    """How the start is found: on how many rows, with inputs of the unquantized model ("collect") or of what is built ("sweep"), and what
    refines it; and whether the answers alone count in rows of turns.

    >>> fb.Start(calibration="both")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: calibration is 'both'; it can be 'collect' or 'sweep'
    """

    calibration: str = "collect"
    calibration_rows: int = 16
    assistant_only_loss: bool = True
    refine: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.calibration not in ("collect", "sweep"):
            raise Invalid(f"calibration is {self.calibration!r}; it can be 'collect' or 'sweep'")

    @property
    def plain(self) -> Start:
        """The same rows, and nothing that is built or refined on them.

        >>> fb.Start(calibration="sweep", calibration_rows=8, refine=(fb.ApiQ(),)).plain
        Start(calibration='collect', calibration_rows=8, assistant_only_loss=True, refine=())
        """
        return replace(self, calibration="collect", refine=())

    @property
    def sweeps(self) -> bool:
        """Do the inputs that the start is calibrated on come from what is built already?

        >>> fb.Start().sweeps, fb.Start(calibration="sweep").sweeps
        (False, True)
        """
        return self.calibration == "sweep"


@dataclass(frozen=True)
class Workload:
    """Levers, counts and start together: what memory is a function of, beside the model.

    >>> work = Workload(fb.Levers(max_length=256))
    >>> Workload.of(work.to_json()) == work
    True
    """

    levers: Levers = Levers()
    counted: Counted = Counted()
    start: Start = Start()

    def to_json(self) -> dict[str, Any]:
        """All of it in one flat mapping; what is not there is left out.

        >>> held = Workload().to_json()
        >>> held["max_length"], held["calibration"], "compute" in held
        (512, 'collect', False)
        """
        levers, counted, start = (vars(part) for part in (self.levers, self.counted, self.start))
        flat = {k: v for k, v in (levers | start | counted).items() if v is not None and k != "refine"}
        flat["optim"] = optim_entry(self.levers)
        return flat | ({"refine": [registry.to_json(r) for r in self.start.refine]} if self.start.refine else {})

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Workload:
        """The inverse; what is not said is as it is by default. Raises Invalid for a key that none of them has.

        >>> Workload.of({"calibration_rows": 8}).start.calibration_rows
        8
        >>> Workload.of({"lever": 1})
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: levers.lever is nothing that finebits knows: the plan was made by another version, plan again
        """
        parts = {part: {f.name for f in fields(part)} for part in (Levers, Counted, Start)}
        unknown = sorted(data.keys() - set().union(*parts.values()))
        if unknown:
            raise Invalid(f"levers.{unknown[0]} is nothing that finebits knows: the plan was made by another version, plan again")
        levers, counted, start = ({k: v for k, v in data.items() if k in known} for known in parts.values())
        start["refine"] = tuple(registry.from_json("refine", r) for r in start.get("refine", ()))
        return cls(Levers(**read_optim(levers)), Counted(**counted), Start(**start))


def optim_entry(levers: Levers) -> Any:
    """The optimizer as JSON has it.

    >>> optim_entry(fb.Levers()), optim_entry(fb.Levers(optim=optimizers.named("lion")))
    ('adamw_torch', {'paper': 'lion', 'beta1': 0.9, 'beta2': 0.99})
    """
    return levers.optim if isinstance(levers.optim, str) else registry.to_json(levers.optim)


def read_optim(levers: Mapping[str, Any]) -> dict[str, Any]:
    """Levers out of JSON, with the optimizer as a value where it has settings.

    >>> read_optim({"optim": {"paper": "lion"}, "loss_chunk": 256})["optim"] == optimizers.named("lion")
    True
    """
    optim = levers.get("optim")
    return dict(levers) | ({"optim": registry.from_json("optim", optim)} if isinstance(optim, Mapping) else {})


def parts(size: int, together: int = 1) -> list[int]:
    """The batches, largest first, that a batch can be made of in equal passes, with `together` rows in one pass.

    >>> parts(12), parts(12, together=2)
    ([12, 6, 4, 3, 2, 1], [12, 6, 4, 2])
    """
    return [b for b in range(size, 0, -1) if size % b == 0 and (b % together == 0 or b == size)]


def variants(levers: Levers, pulls: Sequence[str]) -> Iterator[tuple[float, Levers]]:
    """(how much slower, levers) for every combination of what may be pulled; the levers as they are come first.

    >>> asked = fb.Levers(per_device_train_batch_size=4)
    >>> [(v.per_device_train_batch_size, v.gradient_accumulation_steps) for _, v in variants(asked, ["micro_batch"])]
    [(4, 1), (2, 2), (1, 4)]
    """
    batch, passes = levers.per_device_train_batch_size, levers.gradient_accumulation_steps
    chunks = [levers.loss_chunk]
    parted = "micro_batch" in pulls and not optimizers.named(levers.optim).layerwise
    batches = parts(batch, levers.together or 1) if parted else [batch]
    while "loss_chunk" in pulls and chunks[-1] // 2 >= LEAST_CHUNK:
        chunks.append(chunks[-1] // 2)
    checkpointings = [levers.gradient_checkpointing]
    checkpointings += [True] if "checkpointing" in pulls and not checkpointings[0] else []
    optims = [levers.optim]
    smaller = optimizers.named(levers.optim).smaller if "optim" in pulls else None
    optims += [s.hf for s in [optimizers.named(smaller)] if levers.device in s.devices] if smaller else []
    places = [levers.embeddings]
    places += ["cpu"] if "embeddings" in pulls and levers.device != "cpu" and places[0] == "device" else []
    for b in batches:
        for j, chunk in enumerate(chunks):
            for checkpointing in checkpointings:
                for (k, optim), (n, place) in itertools.product(enumerate(optims), enumerate(places)):
                    slower = SLOWER["halved micro-batch"] ** math.log2(batch / b) * SLOWER["halved chunk"] ** j * SLOWER["optim"] ** k
                    slower *= (SLOWER["checkpointing"] if checkpointing else 1.0) * SLOWER["embeddings"] ** n
                    fewer = {"per_device_train_batch_size": b, "gradient_accumulation_steps": passes * (batch // b)}
                    yield (
                        slower,
                        replace(levers, **fewer, loss_chunk=chunk, gradient_checkpointing=checkpointing, optim=optim, embeddings=place),
                    )


def in_words(levers: Levers) -> str:
    """The levers that may be pulled, in words.

    >>> in_words(fb.Levers(per_device_train_batch_size=2, gradient_accumulation_steps=8))
    'micro-batch 2 x 8, checkpointing, loss chunk 256'
    """
    parts = [f"micro-batch {levers.per_device_train_batch_size} x {levers.gradient_accumulation_steps}"]
    parts += ["checkpointing" if levers.gradient_checkpointing else "no checkpointing", f"loss chunk {levers.loss_chunk}"]
    parts += [kind.label for kind in [optimizers.named(levers.optim)] if kind.label]
    return ", ".join(parts + (["embeddings on the CPU"] if levers.embeddings == "cpu" else []))
