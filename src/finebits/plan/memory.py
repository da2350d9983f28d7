"""What a run holds, term by term.

A batch has b rows of t tokens, K of them with a loss; the model has L blocks of hidden size H and V words; a number takes c bytes in the dtype
that a model is held in, i in the one that its blocks compute in. What blocks hold is observed on the model's own modules
(finebits.interop.observed) for rows of a few lengths; all else is arithmetic. Terms are shown separately because only then a wrong one can be
found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from finebits.optim import base as optimizers
from finebits.plan.levers import Levers, Workload
from finebits.plan.seen import Batch, Observed
from finebits.stream import STATES_IN_MEMORY


@dataclass(frozen=True)
class Geometry:
    """What the memory model needs of a model: sizes, the parameters outside the planned linears, and what was seen of its blocks."""

    vocabulary: int  # outputs of the head: words, or classes
    embeddings: int  # parameters of the input embeddings, and of the head where it is the same tensor
    head: int  # parameters of an output head of its own; 0 where it is tied
    other: int  # norms, biases, routers and linears that are left alone
    largest: int  # elements of the largest planned matrix
    widest: int  # rows and columns of the planned matrix that has most of both
    observed: Observed
    lookup: int = 0  # of the embeddings, parameters that no head multiplies by: they may stay in host memory
    copies: int = 1  # float32 numbers an output that are there at a time in the loss (finebits.tasks._head.Head)
    inputs: int = 0  # bytes of a row beside its tokens: a picture's numbers
    whole: tuple[int, int] = (0, 0)  # parameters outside the planned linears that are trained themselves, and those of the largest
    packed: int = 0  # parameters of embeddings that are planned with the linears, and so are in none of the numbers above
    taught: int = 0  # those of them that a head multiplies by: scoring holds the unquantized ones as well
    rules: tuple[int, int] = (0, 0)  # bytes that training rules hold in a step, and that they keep more of every token in all blocks
    full: tuple[tuple[int, int, int], ...] = ()  # planned matrices that are trained themselves: (rows, columns, how many)

    @property
    def layers(self) -> int:
        return self.observed.layers

    @property
    def hidden(self) -> int:
        return self.observed.hidden

    def to_json(self) -> dict[str, Any]:
        some = ("inputs", "packed", "taught", "whole", "rules", "full")
        data = {k: v for k, v in asdict(self).items() if k != "observed" and (k not in some or (any(v) if isinstance(v, tuple) else v))}
        return data | {"observed": self.observed.to_json()}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Geometry:
        """The inverse. Raises TypeError or KeyError if it was written by another version."""
        pairs = {k: tuple(data.get(k, (0, 0))) for k in ("whole", "rules")}
        full = tuple(tuple(line) for line in data.get("full", ()))
        return cls(**{**data, "observed": Observed.of(data["observed"]), **pairs, "full": full})


@dataclass(frozen=True)
class Trained:
    """What the adapters hold over all planned modules, in numbers: trained, stored beside them and left alone, and the largest rank; and the
    numbers that modules hold again after another one. Of the trained ones those over tables of embeddings, and of these those of tables that a
    head follows."""

    trained: int = 0
    frozen: int = 0
    rank: int = 0
    again: int = 0
    words: int = 0
    followed: int = 0

    def to_json(self) -> dict[str, int]:
        return {k: v for k, v in asdict(self).items() if v or k in ("trained", "frozen", "rank")}


def geometry(
    observed: Observed,
    vocabulary: int,
    others: Mapping[str, int],
    planned: Mapping[str, tuple[int, ...]],
    embeddings: int,
    head: int,
    lookup: int = 0,
    copies: int = 1,
    inputs: int = 0,
    whole: tuple[int, int] = (0, 0),
    packed: int = 0,
    taught: int = 0,
    rules: tuple[int, int] = (0, 0),
) -> Geometry:
    """Sizes from what was seen of the blocks, how many words there are, parameter counts outside the plan by name, shapes inside it, how many
    parameters the embeddings and an untied head have, how many of the embeddings are only looked up, bytes of a row beside its tokens, what is
    trained itself, how many parameters of the embeddings are planned, and of these multiplied by a head, and what rules take."""
    return Geometry(
        vocabulary=vocabulary,
        embeddings=embeddings,
        head=head,
        other=sum(others.values()) - embeddings - head,
        largest=max((s[-2] * s[-1] for s in planned.values()), default=0),
        widest=max((s[-2] + s[-1] for s in planned.values()), default=0),
        observed=observed,
        lookup=lookup,
        copies=copies,
        inputs=inputs,
        whole=whole,
        packed=packed,
        taught=taught,
        rules=rules,
    )


def batches(w: Workload) -> list[Batch]:
    """The batches that can be the worst: those that the rows of the data make, where they were counted (`Counted.batches`, by rows a batch),
    else one of full rows with a loss on every token.

    >>> batches(Workload(Levers(per_device_train_batch_size=2, max_length=100)))  # nothing was counted: full rows, padded to 8
    [Batch(rows=2, tokens=104, labelled=208, widths=4, first=False)]
    """
    b, t = w.levers.per_device_train_batch_size, w.levers.padded(w.levers.max_length)
    worst = w.counted.of(b).get("worst", [[t, b * t]])
    full = [(*one, _widths(w))[:3] + (len(one) > 3,) for one in worst]
    return [Batch(b, min(t, long), min(labelled, b * min(t, long)), widths, first) for long, labelled, widths, first in full]


def scored(w: Workload) -> Batch:
    """The batch that asks for most where a model is scored: of the held-out rows, where they were counted (`Counted.scored`: rows, tokens,
    labels), else as wide as any of training, with as many labels as any.

    >>> from finebits.plan.levers import Counted
    >>> scored(Workload(counted=Counted(scored=(3, 50, 20))))
    Batch(rows=3, tokens=50, labelled=20, widths=1, first=False)
    """
    if w.counted.scored is not None:
        b, t, labelled = w.counted.scored
        return Batch(b, min(t, w.levers.padded(w.levers.max_length)), labelled)
    b, t, *_ = max(batches(w), key=lambda batch: batch.tokens)
    return Batch(b, t, max(batch.labelled for batch in batches(w)))


def worst(met: Sequence[tuple[int, int]], first: int = 0) -> dict[tuple[int, int, int], int]:
    """Of a run's batches in their order, as (tokens of a padded row, trained tokens), those that no other exceeds in both and in the number of
    widths met by then: (tokens, trained, widths) -> the place of the last such batch. Those of the `first` step, before which the optimizer has
    no state, exceed none but one another.

    >>> worst([(10, 5), (8, 8), (8, 4)])  # the third has no more than the second in anything
    {(8, 8, 2): 1, (10, 5, 1): 0}
    >>> worst([(10, 9), (8, 8), (8, 4)], first=1)
    {(8, 8, 2): 1, (10, 9, 1): 0}
    """
    widths, places = set[int](), dict[tuple[int, int, int], int]()
    for i, (long, labelled) in enumerate(met):
        widths.add(long)
        places[long, labelled, len(widths)] = i
    front: list[tuple[int, int, int]] = []
    for p in sorted(places, key=lambda p: (p[2], p[0], p[1]), reverse=True):  # what exceeds p comes before it
        if not any(all(a >= b for a, b in zip(q, p, strict=True)) for q in front if places[q] >= first or places[p] < first):
            front.append(p)
    return {p: places[p] for p in sorted(front)}


def widened(g: Geometry, batch: Batch, levers: Levers) -> int:
    """Bytes that a block keeps of its input and of the sum half way, where those are wider inside than they came."""
    i = levers.inner
    return 2 * batch.rows * (batch.tokens + g.observed.virtual) * g.hidden * i if i > levers.width else 0


def again(g: Geometry, trained: Trained, batch: Batch, levers: Levers) -> int:
    """Bytes of one block that is computed again from its input, and backwards, its input aside."""
    more = (_ranked(g, trained, batch) + _ruled(g, batch)) // max(g.layers, 1)
    return g.observed.again(batch) + more + _cast(g, trained, levers) + widened(g, batch, levers)


def kept(g: Geometry, trained: Trained, batch: Batch, levers: Levers) -> int:
    """Bytes that all blocks keep for their backward pass."""
    more = _cast(g, trained, levers) + widened(g, batch, levers)
    return g.observed.kept(batch) + _ranked(g, trained, batch) + _ruled(g, batch) + max(g.layers, 1) * more


def _ranked(g: Geometry, trained: Trained, batch: Batch) -> int:
    """What adapters of another rank keep more of all blocks' tokens than those that were seen: their inner values."""
    return batch.rows * batch.tokens * g.observed.adapted * (trained.rank - g.observed.rank) * g.observed.width


def _ruled(g: Geometry, batch: Batch) -> int:
    """What rules keep of all blocks' tokens."""
    return batch.rows * batch.tokens * g.rules[1]


def _cast(g: Geometry, trained: Trained, levers: Levers) -> int:
    """A block's share of the adapters' tensors, which are float32, in the dtype that blocks compute in; shared ones are cast by every host."""
    i = levers.inner
    return i * (trained.trained + trained.frozen + trained.again) // max(g.layers, 1) if i < 4 else 0


def moments(g: Geometry, linears: int, trained: Trained, w: Workload, batch: Batch | None = None) -> dict[str, dict[str, int]]:
    """What is held at the moments of a training step on `batch` (the workload's first) that can be its peak, term by term, in bytes.

    - loss: every block's input is kept and a chunk of logits exists, or the gradient of the states goes back to the last block;
    - last block: the backward pass begins, one block is computed again over all the inputs;
    - first block: it ends, the inputs are gone and all gradients are there;
    - words: the gradients of adapters over tables of embeddings come, whole as the tables are, and are added to those of before;
    - step: the optimizer works;
    - evaluation: the worst batch of held-out rows goes through, where any do while training; nothing is kept for a backward pass.
    `linears` are the bytes of the planned weights.
    """
    levers, shape = w.levers, batch or batches(w)[0]
    c, i = levers.width, levers.inner
    b, t, labelled, widths, first = shape
    see, kind = g.observed, optimizers.named(levers.optim)
    states = b * (t + see.virtual) * g.hidden * c
    always = {
        "linear weights": linears,
        "head": g.head * c,
        "embeddings": g.embeddings * c - hosted(g, levers),
        "norms and other": g.other * c,
        "adapters": 4 * trained.trained,
        "frozen factors": 4 * trained.frozen,
        "optimizer": kind.state(trained.trained) + kind.state(g.whole[0]) + sum(count * kind.matrix(m, n) for m, n, count in g.full),
        "dense scratch": g.largest * i,
        "runtime": runtime(w, widths),
    }
    always |= {"rules": g.rules[0]} if g.rules[0] else {}
    whole = c * sum(g.whole)  # of what is trained itself: a head's is there first, and what is added to one is another
    largest = max((m * n for m, n, _ in g.full), default=0)
    full = c * (largest if kind.layerwise else sum(m * n * count for m, n, count in g.full))
    gradients, early = {"gradients": 4 * trained.trained + whole + full}, whole + 4 * trained.followed
    adding = gradients if levers.gradient_accumulation_steps > 1 else {"gradients": early} if early else {}
    shared = {"masks and positions": see.shared(shape)} | ({"inputs": b * g.inputs} if g.inputs else {})
    if levers.gradient_checkpointing:
        inputs = {"block inputs": g.layers * (states + RANDOM)}
        one = {"one block": again(g, trained, shape, levers) + see.left(shape) + 2 * RANDOM}
        left = {"block inputs": 2 * (states + RANDOM)}
    else:
        activations = kept(g, trained, shape, levers)
        inputs = {"activations": activations}
        one = {"one block": see.back(shape)}
        left = {"activations": see.most(shape) + (activations - see.kept(shape)) // max(g.layers, 1)}
    logits = min(levers.loss_chunk, labelled) * g.vocabulary * max(4 + (c if c < 4 else 0), 4 * g.copies)
    logits += (4 + (i if i < 4 else 0)) * trained.followed  # of every chunk a gradient once more, and what is cast for it
    own = labelled * g.hidden * c  # the labelled states, and their gradient
    # For all tensors at once on a device; here for one at a time, of which an adapter's is small, and the one before.
    moved = max(g.whole[1], largest)
    one_by_one = max((STEP if c < 4 or largest else 12) * moved, 3 * 4 * trained.words)
    step = 4 * trained.trained + c * g.whole[0] if levers.device == "cuda" and not largest else one_by_one
    held = {"evaluation": always | _evaluated(g, w)} if w.counted.evaluated else {}
    ahead = always | {"optimizer": 0} if first and not kind.layerwise else always  # its state is made in the step
    words = {"words": ahead | shared | gradients | {"one block": 4 * trained.words}} if trained.words else {}
    return (
        words
        | held
        | {
            "loss": ahead | inputs | shared | {"loss chunk": max(see.ends(shape) + logits + 2 * own, see.turn(shape) + 2 * own)} | adding,
            "last block": ahead | inputs | shared | one | adding,
            "first block": ahead | left | shared | one | gradients,
            "step": always | gradients | {"optimizer's work": step},
        }
    )


def _evaluated(g: Geometry, w: Workload) -> dict[str, int]:
    """What a batch of held-out rows holds while training: blocks' work, and a chunk of logits."""
    c, shape = w.levers.width, scored(w)
    logits = min(w.levers.loss_chunk, shape.labelled) * g.vocabulary * max(4 + (c if c < 4 else 0), 4 * g.copies)
    work = g.observed.forward(shape) + g.observed.shared(shape)
    found = {"activations": work, "loss chunk": logits + 2 * shape.labelled * g.hidden * c}
    return found | ({"inputs": shape.rows * g.inputs} if g.inputs else {})


def hosted(g: Geometry, levers: Levers) -> int:
    """Bytes of embeddings that stay in host memory beside a device that has its own; what a head multiplies by is on the device, once."""
    return g.lookup * levers.width if levers.embeddings == "cpu" != levers.device else 0


def terms(g: Geometry, linears: int, trained: Trained, w: Workload) -> dict[str, int]:
    """The terms of the largest moment of the worst batch: their sum is the training peak, in bytes."""
    candidates = [moment for batch in batches(w) for moment in moments(g, linears, trained, w, batch).values()]
    return max(candidates, key=lambda moment: sum(moment.values()))


ROUNDED = 9  # bits at most of a number of a table that has just been rounded, while it is there dense
RANDOM = 5056  # bytes of the generator's state, which a checkpoint keeps
STEP = 24  # bytes a number of a weight that is float32 while it moves: it, its gradient, what the optimizer makes on the way, and its draw
SLICE = 8192  # words of a head that scoring has in float32 at a time

# What the process holds beside tensors of the run. CPU: modules and the data loader, thread stacks, packing buffers and, for every width of a
# batch that was met, code of the matrix library; measured, see docs/decisions/0003-memory-model.md. CUDA: context and allocator slack.
RUNTIME = {"cpu": 42 * 2**20, "cuda": 870 * 2**20}
SCORING = 28 * 2**20  # of a process without a trainer, on a CPU
LOADING = 21 * 2**20  # of one that has not multiplied yet
PER_WIDTH = 13 * 2**20  # a CPU's, computing in 16 bits
ROUTED = 300 * 2**20  # the same where experts make products of any width: all that it keeps at all
UNKNOWN = 4  # widths, at most, where nobody counted them


def runtime(w: Workload, widths: int | None = None) -> int:
    """Bytes beside tensors once batches of so many widths (all, if None) were met: as a probe has measured it, else constants.

    >>> from finebits.plan.levers import Counted
    >>> runtime(Workload(counted=Counted(runtime=50 << 20))) >> 20, runtime(Workload()) >> 20  # MiB, measured or not
    (50, 42)
    """
    code = code_of(w, _widths(w))
    total = RUNTIME[w.levers.device] + code if w.counted.runtime is None else w.counted.runtime
    return total if widths is None else max(total - code + code_of(w, widths), 0)


def code_of(w: Workload, widths: int) -> int:
    """Bytes of code that the matrix library keeps once batches of so many padded widths were met.

    >>> from finebits.plan.levers import Counted
    >>> w = Workload(Levers(dtype="bfloat16"))
    >>> code_of(w, 2) >> 20, code_of(Workload(w.levers, Counted(routed=True)), 2) >> 20
    (26, 300)
    """
    each = per_width(w.levers)
    return max(each * widths, ROUTED if each and widths and w.counted.routed else 0)


def per_width(levers: Levers) -> int:
    """Bytes of code that the matrix library keeps for every padded width.

    >>> per_width(Levers()), per_width(Levers(dtype="bfloat16")) >> 20
    (0, 13)
    """
    return PER_WIDTH if levers.device == "cpu" and levers.inner < 4 else 0


def _widths(w: Workload) -> int:
    """Padded widths that a run meets."""
    levers = w.levers
    most = min(levers.padded(levers.max_length) // levers.rounding, UNKNOWN)
    return w.counted.of(levers.per_device_train_batch_size).get("widths", most)


def phases(g: Geometry, linears: int, dense: int, trained: Trained, w: Workload, swept: Swept | None = None) -> dict[str, int]:
    """Peaks of the phases around training on the levers' device, in bytes above the same baseline. A model is loaded and started in host memory,
    embeddings and all. `start` is among them where that runs the model on calibration rows, through the statistics `swept`."""
    levers, shape = w.levers, scored(w)
    c = levers.width
    adapter = trained.trained + trained.frozen
    loaded = linears + (g.embeddings + g.head + g.other) * c + 4 * adapter
    chunk = min(levers.loss_chunk, shape.labelled) * g.vocabulary * 3 * 4  # two float32 log-probabilities and one product
    ends = g.packed * c  # as the unquantized model has them, and as they are exported
    table = (g.embeddings + g.packed) if trained.words else 0  # one that is adapted is made whole to be exported
    apart = (g.embeddings + g.head + g.other) * c + ends
    heads = chunk + min(SLICE, g.vocabulary) * 4 * (g.hidden + min(levers.loss_chunk, shape.tokens * shape.rows))  # a slice in float32
    beside, block = runtime(w, 0), dense // max(g.layers, 1)
    on_device = loaded - hosted(g, levers)
    start, met = {}, _widths(w)
    host = levers.device == "cpu"  # where models are built: another device is given one that is ready
    if swept is not None and host:
        widths = -(-w.start.calibration_rows // _calibrated(w)[0])  # calibration batches are as wide as their rows
        most = loaded + starting(g, dense, trained, w, swept)
        if swept.backward:
            most = max(most, apart + returning(g, dense, trained, w, swept))
        if g.packed:
            most = max(most, apart + ROUNDED * g.packed // 8 + 8 * g.largest * 4)
        start["start"], met = most + beside + code_of(w, widths), max(met, widths)
    i = levers.inner
    work = g.observed.forward(shape) + g.observed.shared(shape) + shape.rows * g.inputs
    wide = block * i // c if i > c else 0  # of a dense block, what computes
    return start | {
        "full": apart + max(block + wide + work, heads) + (SCORING if host else beside),
        # what a start left, or one made here
        "load": loaded + (LOADING if start else 8 * g.largest * 4 + ends + beside) if host else on_device + beside,
        "eval": on_device + g.taught * c + work + chunk + g.largest * i + beside + code_of(w, met),
        "save": on_device + 4 * adapter + beside,
        "export": on_device + max(dense // max(g.layers, 1), ends, table * c) + beside,
        # of a table with trained rows, peft makes another; in float32, where ours is not
        "verify": on_device
        + (g.embeddings + g.head) * c
        + ends
        + (2 * 4 - c) * table
        + max(4 * block // c + 4 * work // i, heads)
        + beside
        + per_width(levers),
    }


def starting(g: Geometry, dense: int, trained: Trained, w: Workload, swept: Swept) -> int:
    """What a sweep holds beside the model as it will be (finebits.sweep), at the largest of its moments:

    - a block is quantized: it is dense, its statistics are there, and one matrix is worked on in float32, with copies of its own statistics;
    - the states go through the dense block;
    - a refinement of scope "block" trains it dense, with gradients, Adam's state and a copy of what it trains;
    - a refinement of scope "model" trains all blocks under checkpoints, with logits of `chunk` tokens, where it makes any;
    - where one moves scales, these are trained as well, and the gradient of a weight is there on the way to them; where
      one moves clips or weights, the block as it was is there as well, and a matrix is rounded;
    - weights that learn, and the gradients that move words, are there in float32.

    The states of all calibration rows wait between two blocks, in a file where they are many; where there is a goal, the unquantized model's
    too, and the last alone while the whole model is refined.
    """
    levers, L = w.levers, max(g.layers, 1)
    c, i = levers.width, levers.inner
    b, t, tokens = _calibrated(w)
    shape, stream, block = Batch(b, t, b * t), tokens * g.hidden * c, dense // L
    see = g.observed
    inside, work = again(g, trained, shape, levers), see.forward(shape) + see.shared(shape)
    work += g.largest * i if i > c else 0  # a dense matrix is widened while it multiplies
    compared = b * t * g.hidden * (2 * c + 4 * 4)  # the states of both, in float32, their difference and its gradient
    waiting = min(stream, STATES_IN_MEMORY)
    streams = (2 if w.start.refine else 1) * waiting
    peaks = [streams + block + swept.block + COPIES * swept.matrix + 8 * g.largest * 4, streams + block + work]
    for r in w.start.refine:
        moves = r.moves
        scaled = LEARNING * (swept.scales if r.scope == "block" else swept.all_scales) + g.largest * (2 * 4 + i) if "scales" in moves else 0
        scaled += LEARNING * swept.scales + block + g.largest * (6 * 4 + i) if "clips" in moves else 0
        numbers = (block if r.scope == "block" else dense) // c
        scaled += numbers * LATENT + block + g.largest * 6 * 4 if "weights" in moves else 0
        scaled += numbers * WORDED if "words" in moves else 0
        if r.scope == "block":
            through = max(inside, see.most(shape) + compared)
            peaks.append(streams + block + through + see.shared(shape) + 16 * trained.trained // L + scaled)
        else:
            some = getattr(r, "chunk", 0) if getattr(r, "truth", 1.0) else 0
            logits = min(some, b * t) * g.vocabulary * (c + 3 * 4)  # log-probabilities of both and a gradient
            # the last block to be computed again, and all gradients
            ends = inside + see.shared(shape) + g.largest * c + 4 * trained.trained
            peaks.append(waiting + L * b * t * g.hidden * c + max(ends, logits or compared) + 12 * trained.trained + scaled)
    return max(peaks)


def returning(g: Geometry, dense: int, trained: Trained, w: Workload, swept: Swept) -> int:
    """What gradients that come back block by block hold beside the embeddings and the head: one block, its activations, its statistics, and
    the states that wait, those that entered every block in a file where they are many."""
    levers, c, L = w.levers, w.levers.width, max(g.layers, 1)
    _, t, tokens = _calibrated(w)
    shape, stream = Batch(1, t, t), tokens * g.hidden * c
    inside = again(g, trained, shape, levers) + g.observed.shared(shape)
    logits = min(t, levers.loss_chunk) * g.vocabulary * 3 * 4
    rows_of = t * (8 * g.widest + 12 * g.hidden)
    summing = 3 * 4 * g.largest + rows_of  # a sum, a batch's part of it and the new one; its rows
    return min(L * stream, STATES_IN_MEMORY) + min(stream, STATES_IN_MEMORY) + max(logits, dense // L + inside + swept.block + summing)


class Swept(NamedTuple):
    """Bytes of the statistics of the block, and of the matrix, that asks for most; whether there are gradients among them; how many scales
    the block with most of them has, and all blocks together."""

    block: int
    matrix: int
    backward: bool = False
    scales: int = 0
    all_scales: int = 0


COPIES = 4  # of a Gram matrix, while a quantizer factors it
LATENT = 6 * 4  # bytes of a weight that learns: itself as it was twice, as it is, its gradient, Adam's state
WORDED = 4 + 3  # and of one in words: the gradients that add up, its codes as they are and as they were, at most one code a weight
LEARNING = (
    36  # bytes of a scale that learns: itself as it was, as it is and in its store, what moves it with gradient, Adam's state and a copy
)


def _calibrated(w: Workload) -> tuple[int, int, int]:
    """(rows of a batch, tokens of the longest row, tokens of all batches, padding included) of the calibration: as counted, else full rows. Rows
    go one by one unless blocks are built or refined on what comes of them."""
    b, t = w.levers.per_device_train_batch_size, w.levers.max_length
    alone = not w.start.refine and not w.start.sweeps
    return (1 if alone else b, *w.counted.of(b).get("calibration", (t, w.start.calibration_rows * t)))
