"""What `finebits eval` measures anew, beside the evaluation that a run wrote of itself: loss, KL and agreement on any rows, a text of another
kind before and after (forgetting), the models' own answers, and tasks of lm-eval. All models see the same rows as the same tokens, so that every
difference is taken row by row."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finebits.data.arrays import Tokens
from finebits.data.check import require
from finebits.data.rows import Row, Rows, read
from finebits.errors import Invalid, WrongUse
from finebits.evaluate import harness, matching, suites
from finebits.evaluate.generate import continued, together
from finebits.evaluate.heldout import SCHEMA, Scores, own, table
from finebits.evaluate.preferences import of_answers, paired
from finebits.evaluate.resampled import Resampled
from finebits.files import ours, write_json
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.report import results
from finebits.run.contestants import AGAINST, FULL, Contestant, groups
from finebits.run.material import Material, batched
from finebits.run.places import place_of
from finebits.run.source import Subject
from finebits.runfolder import EVALUATED, EVALUATIONS, RECIPE, digest

REFERENCE = "python"  # the text of --forgetting that every Python has with it
TEXTS, SHORTEST = 24, 600  # of it: how many sections, and characters of one


@dataclass(frozen=True)
class Asked:
    """What is to be measured, as the command line says it."""

    data: Path | None = None
    adapters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    against: str | None = None
    exports: bool = True
    limit: int | None = None
    max_length: int | None = None
    forgetting: str | None = None
    generate: bool = False
    match: str = "exact"
    judge: str | None = None
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_folder: Path | None = None
    max_new_tokens: int = 128
    batch: int = 4
    out: Path | None = None


@dataclass(frozen=True)
class Question:
    """One row to answer: its tokens, and what is shown of it."""

    ids: list[int]
    text: str
    reference: str


@dataclass
class Exam:
    """Questions under one name, how answers are scored, and what every contestant said and got."""

    name: str
    measure: str
    questions: list[Question]
    judged: Any  # (questions, answers) -> a number each
    answers: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)


class Evaluation:
    """One evaluation of what `what` names; all that can be refused is refused before a model is loaded."""

    def __init__(self, what: str, asked: Asked, held: Rows | None = None) -> None:
        self.place, self.asked, self.progress = place_of(what), asked, Progress("eval")
        self.manager = harness.check(asked.tasks, asked.tasks_folder) if asked.tasks else None
        match = matching.by(asked.match)
        judge = matching.judge(asked.judge) if asked.judge else None
        self.groups = groups(self.place, asked.adapters, asked.also, asked.against, asked.exports)
        self.notes: list[str] = []
        self.subject = Subject(self.groups[0].folder)
        self.size, self.max_length, self.objective = 4, asked.max_length or 1024, None
        if self.place.run is not None:
            recipe = Recipe.load(self.place.run / RECIPE)
            self.size = recipe.evaluation.per_device_eval_batch_size
            self.max_length, self.objective = asked.max_length or recipe.data.max_length, recipe.objective_value()
        self.rows = self._rows(held)
        self.held = self._held()
        self.text, self.texts = self._forgetting()
        self.exams = self._exams(match, judge)
        self._both_held_out()
        if self.held is None and not self.texts and not self.exams and self.manager is None:
            raise WrongUse(f"{what} is no run with rows of its own: name rows with --data FILE, or --suite, --tasks or --forgetting")
        self._same_tokens()

    # What is asked --------------------------------------------------------------------------------------------------------------------

    def _rows(self, held: Rows | None) -> Rows | None:
        """The rows as they were written, where they are needed or can be had."""
        if self.asked.data is not None:
            held = read(self.asked.data)
        elif held is None and self.place.run is not None and (self.asked.generate or self.asked.limit):
            from finebits.recipe.rows import rows_of

            held = rows_of(Recipe.load(self.place.run / RECIPE))[1]
        return held[: self.asked.limit] if held is not None and self.asked.limit else held

    def _held(self) -> Tokens | None:
        if self.rows is None and self.place.run is None:
            return None
        if self.rows is None:
            assert self.place.run is not None
            made = Material.load(self.place.run).held
        else:
            made = self._tokens(self.subject, self.rows)
        if self.place.run is not None:
            seen = {tuple(e.input_ids) for e in Material.load(self.place.run).train}
            if known := sum(tuple(e.input_ids) in seen for e in made):
                self.notes.append(f"{known} of {len(made)} rows are rows that {self.place.title} was trained on")
        return made

    def _tokens(self, subject: Subject, rows: Rows) -> Tokens:
        check = subject.task.check(rows, subject.processor, self.max_length, True, subject.limits)
        require(check)
        return check.examples

    def _forgetting(self) -> tuple[str, Tokens | None]:
        wanted = self.asked.forgetting
        if wanted is None:
            return "", None
        rows = reference() if wanted == REFERENCE else read(wanted)
        rows = rows[: self.asked.limit] if self.asked.limit else rows
        return rows.path, self.subject.task.examples(rows, self.subject.processor, self.max_length, True)

    def _exams(self, match: matching.Match, judge: matching.Judge | None) -> list[Exam]:
        made = list[Exam]()
        if (self.asked.generate or self.asked.suites) and self.subject.task.pipeline != "text-generation":
            raise Invalid(f"{self.place.title} is a model for {self.subject.task.pipeline}, which generates no answers")
        if judge is not None and not self.asked.generate:
            raise WrongUse("--judge looks at answers to the rows: add --generate")
        if self.asked.generate:
            if self.rows is None:
                raise WrongUse(f"{self.place.title} has no rows of its own: name those to answer with --data FILE")
            prompts = self.subject.task.prompts(self.rows, self.subject.processor, len(self.rows))
            if not prompts:
                raise Invalid(f"{self.rows.path} holds no conversations: --generate asks a row's question and compares with its answer")
            questions = [Question(list(p.given), p.text, p.reference) for p in prompts]
            made.append(Exam("rows", self.asked.match, questions, lambda q, a: [float(match(x, r.reference)) for r, x in zip(q, a)]))
            if judge is not None:
                plainly = lambda q: [{"prompt": r.text, "reference": r.reference} for r in q]  # noqa: E731
                made.append(Exam("rows", "judge", questions, lambda q, a: judge(plainly(q), a)))
        for name in self.asked.suites:
            asked = suites.suite(name, self.asked.limit)
            encoded = [
                self.subject.processor.apply_chat_template(q.messages, add_generation_prompt=True, tokenize=True, return_dict=True)
                for q in asked
            ]
            questions = [Question(list(e["input_ids"]), q.text, q.reference) for e, q in zip(encoded, asked, strict=True)]
            made.append(Exam(name, "score", questions, lambda q, a, asked=asked: [s.score(x) for s, x in zip(asked, a, strict=True)]))
        return made

    def _both_held_out(self) -> None:
        """Raise Invalid where two runs are to be compared on their own rows and have others; note rows that the other was trained on."""
        if self.asked.against is not None and self.asked.data is None:
            other = place_of(self.asked.against)
            if self.place.run is None or other.run is None:
                raise WrongUse("--against compares two runs on the rows that both held out: name other rows with --data FILE")
            if [e.said for e in Material.load(other.run).held] != [e.said for e in Material.load(self.place.run).held]:
                raise Invalid(
                    f"{other.title} held out other rows than {self.place.title}, so that nothing can be paired: name a file that neither was "
                    "trained on with --data FILE"
                )
        if self.asked.against is not None and (run := place_of(self.asked.against).run) is not None:
            seen = {tuple(e.input_ids) for e in Material.load(run).train}
            if known := sum(tuple(e.input_ids) in seen for e in self.held or ()):
                self.notes.append(f"{known} of {len(self.held or ())} rows are rows that {run} was trained on")

    def _same_tokens(self) -> None:
        """Raise Invalid where one of the models sees rows as other tokens than the first does."""
        for group in self.groups[1:]:
            subject = Subject(group.folder)
            if self.rows is None or group.folder == self.subject.folder or subject.sight == self.subject.sight:
                continue
            if [e.said for e in self._tokens(subject, self.rows)] != [e.said for e in self.held or ()]:
                raise Invalid(
                    f"{group.members[0].name} sees these rows as other tokens than {self.groups[0].members[0].name}: their losses cannot be "
                    "paired"
                )

    # What is measured -----------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """evaluation.json of it all."""
        task, processor = self.subject.task, self.subject.processor
        parts = {"rows": self.held, "forgetting": self.texts}
        batches = {k: batched(tokens, task, processor, self.size) for k, tokens in parts.items() if tokens is not None}
        scores: dict[str, dict[str, Scores]] = {k: {} for k in batches}
        rows: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        members = list[Contestant]()
        with tempfile.TemporaryDirectory() as place:
            teachers: dict[str, Any] = dict.fromkeys(batches)
            for group in self.groups:
                with group.opened() as open:
                    missing = [m.name for m in group.members if m.key not in open]
                    self.notes += [f"left out, since what was tuned is not adapters alone: {name}" for name in missing]
                    for who in (m for m in group.members if m.key in open):
                        members.append(who)
                        one = open[who.key]
                        for k, of in batches.items():
                            if first := len(members) == 1:
                                teachers[k] = one.teach(of, Path(place, k))
                            scores[k][who.key] = own(teachers[k], of) if first else one.score(of, teachers[k])
                            what = "" if k == "rows" else " on the other text"
                            self.progress.say(f"{who.name}: loss {scores[k][who.key].loss:.4f}{what}")
                        if self.exams or self.manager is not None:
                            with one.whole() as model:
                                self._examine(who, model, processor)
                                if self.manager is not None:
                                    limit, length = self.asked.limit, self.asked.max_length
                                    rows[who.key] = harness.rows(
                                        self.manager, self.asked.tasks, model, processor, limit, self.asked.batch, False, length
                                    )
        return self._result(members, scores, rows)

    def _examine(self, who: Contestant, model: Any, processor: Any) -> None:
        """Every exam's answers of one contestant, and what they got."""
        said: dict[int, tuple[list[str], float]] = {}
        stops = _stops(self.subject)
        for exam in self.exams:
            if id(exam.questions) not in said:
                said[id(exam.questions)] = self._answers(who, exam, model, processor, stops)
            exam.answers[who.key], exam.speeds[who.key] = said[id(exam.questions)]
            exam.scores[who.key] = np.array(exam.judged(exam.questions, exam.answers[who.key]), dtype=np.float64)
            self.progress.say(f"{who.name}: {exam.name}, {exam.measure} {exam.scores[who.key].mean():.3f} of {len(exam.questions)}")

    def _answers(self, who: Contestant, exam: Exam, model: Any, processor: Any, stops: Sequence[int]) -> tuple[list[str], float]:
        size, answers, tokens, begun = together(model, self.asked.batch), list[str](), 0, time.perf_counter()
        for i in range(0, len(exam.questions), size):
            part = [q.ids for q in exam.questions[i : i + size]]
            made = continued(model, part, self.asked.max_new_tokens, stops)
            tokens += sum(len(c.ids) for c in made)
            answers += [processor.decode(c.ids, skip_special_tokens=True).strip() for c in made]
            self.progress(len(answers), len(exam.questions), f"{who.name}: {exam.name}")
        return answers, tokens / max(time.perf_counter() - begun, 1e-9)

    # What is told ---------------------------------------------------------------------------------------------------------------------

    def _result(
        self, members: Sequence[Contestant], scores: Mapping[str, Mapping[str, Scores]], rows: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        keys = [m.key for m in members]
        names, stages = ({m.key: getattr(m, a) for m in members} for a in ("name", "stage"))
        rivals = {m.key: m.rival for m in members if m.rival in keys}
        bits = {m.key: m.bits for m in members if m.bits is not None}
        tabled = lambda of: table(of, names, stages, rivals, bits, self.subject.task)  # noqa: E731
        made = {k: self._of_wanted(of, tabled) if k == "rows" else tabled(of) for k, of in scores.items()}
        main = next((m.key for m in reversed(members) if m.stage == "tuned" and m.key != AGAINST), keys[-1])
        result: dict[str, Any] = made.pop("rows", {"schema": SCHEMA, "rows": 0, "tokens": 0, "unit": self.subject.task.unit, "entries": []})
        result |= {"main": main, "what": self.place.title, "data": str(self.rows.path if self.rows is not None else self._named())}
        result |= {"verdict": results.verdict(result) if result["entries"] else "", "notes": self.notes}
        if "forgetting" in made:
            result |= {"forgetting": made["forgetting"] | {"text": self.text}}
        measures = [measure(e.name, e.measure, e.scores, names, rivals) for e in self.exams]
        for task in dict.fromkeys(task for by in rows.values() for task in by):
            of = {key: by[task] for key, by in rows.items() if task in by}
            metrics = dict.fromkeys(metric for found in of.values() for metric in found)
            measures += [measure(task, metric, {k: f[metric] for k, f in of.items() if metric in f}, names, rivals) for metric in metrics]
        if measures:
            result |= {"measures": measures, "answers": [answered(e) for e in self.exams]}
        return result

    def _of_wanted(self, scores: Mapping[str, Scores], tabled: Callable[[Mapping[str, Scores]], dict[str, Any]]) -> dict[str, Any]:
        """The table of the rows; of answers of which some were not wanted that of those that were, with how each prefers them."""
        assert self.held is not None
        if not self.held.unwanted:
            return tabled(scores)
        wanted = len(self.held) - len(self.held.unwanted)
        self.notes.append(f"loss, KL and agreement are of the {wanted} answers that were wanted, of {len(self.held)}")
        if self.objective is None and paired(self.held):
            self.notes.append("margins are differences of log-probabilities of the two answers of a pair, in nats, against no reference")
        return of_answers(scores, self.held, tabled, self.objective, lambda key: "untuned" if "untuned" in scores else FULL)

    def _named(self) -> str:
        return f"the rows that {self.place.run} held out" if self.place.run is not None else "no rows"

    def write(self, result: Mapping[str, Any]) -> Path | None:
        """Into --out, else into the run's folder, under a name of its own; the run's own evaluation stays. None where there is no run."""
        place = self.asked.out
        if place is None and self.place.run is not None:
            stem = Path(self.rows.path).stem if self.rows is not None else "held_out"
            asked = json.loads(json.dumps(asdict(self.asked), default=str))
            place = self.place.run / EVALUATIONS / f"{stem}-{digest(asked, [e.said for e in self.held or ()])[:8]}.json"
        if place is not None:
            ours(place, EVALUATED)
            write_json(place, result)
        return place


def evaluate(what: str, asked: Asked, held: Rows | None = None) -> tuple[dict[str, Any], Path | None]:
    """(what was measured, where it was written)."""
    made = Evaluation(what, asked, held)
    result = made.run()
    return result, made.write(result)


def measure(
    name: str, of: str, scores: Mapping[str, np.ndarray], names: Mapping[str, str], rivals: Mapping[str, str | None]
) -> dict[str, Any]:
    """Means of what rows got, with intervals, and differences row by row.

    >>> made = measure("rows", "exact", {"none": np.zeros(40), "tuned": np.ones(40)}, {"none": "m", "tuned": "r"}, {"tuned": "none"})
    >>> made["entries"][1]["value"], made["entries"][1]["paired"]
    (1.0, {'against': 'none', 'difference': [1.0, 1.0, 1.0]})
    """
    if len({len(v) for v in scores.values()}) > 1:
        raise Invalid(f"{name} was answered on different rows by {' and '.join(scores)}: nothing can be paired")
    rows = len(next(iter(scores.values())))
    drawn, entries = Resampled(np.ones(rows)), list[dict[str, Any]]()
    for key, got in scores.items():
        rival = rivals.get(key)
        paired = {"against": rival, "difference": drawn.minus(got, scores[rival])} if rival is not None and rival in scores else None
        entries.append({"key": key, "name": names[key], "value": drawn.mean(got), "interval": drawn.interval(got), "paired": paired})
    return {"name": name, "measure": of, "rows": rows, "entries": entries}


def answered(exam: Exam) -> dict[str, Any]:
    """Every question with what was said to it."""
    rows = [
        {
            "prompt": q.text,
            "reference": q.reference,
            "answers": {k: a[i] for k, a in exam.answers.items()},
            "scores": {k: float(s[i]) for k, s in exam.scores.items()},
        }
        for i, q in enumerate(exam.questions)
    ]
    return {"name": exam.name, "measure": exam.measure, "tokens_per_second": exam.speeds, "rows": rows}


def reference() -> Rows:
    """Sections of Python's language reference, which every Python has with it: English about a language, and no conversation.

    >>> rows = reference()
    >>> len(rows), rows.format
    (24, 'text')
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise Invalid("this Python came without its language reference (pydoc_data): name a text with --forgetting FILE") from e
    long = [topics[k] for k in sorted(topics) if len(topics[k]) >= SHORTEST]
    chosen = long[:: max(1, len(long) // TEXTS)][:TEXTS]
    return Rows("Python's language reference", "text", "of this Python", tuple(Row(i, text=t) for i, t in enumerate(chosen, 1)))


def _stops(subject: Subject) -> list[int]:
    from finebits.interop.tokenizer import stops_of

    return stops_of(subject.folder, subject.processor)
