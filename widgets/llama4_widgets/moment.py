"""One moment of a model: a prompt, the edits, and what was computed of both, each once.

JupyterLab hands what people do to a thread of its own, beside that of the cells, and a model is
changed while it runs with edits: so one thread at a time computes here.

With `explore` this is the only module here that needs torch; views ask it for arrays.
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float

from llama4_lab.analysis.decomposition import written, written_points
from llama4_lab.analysis.routing import routing_in, routing_of
from llama4_lab.edits import Edit, changes_of, check, edited
from llama4_lab.experts import probe
from llama4_lab.model import Llama4, attention
from llama4_lab.prompt import Prompt, tokens_of
from llama4_lab.replay import Edited, Replay
from llama4_widgets.slices import running_loop, stoppable
from llama4_widgets.words import visible, word_of

T = TypeVar("T")
MAX_TOKENS = 4096  # more would make the views slow, and nobody reads that many words
ROUNDING = 1e-6  # nats; of the same computed anew in float32, KL is less
_TURN = threading.RLock()
_SHORT = 512  # tokens; runs of fewer gain less from a second thread than the browser loses
_REST = 1.0  # seconds in which nobody asked for compiled experts
_TOP = 6  # words that could follow


@dataclass(frozen=True)
class Reading:
    """A question that is answered by what a run keeps at some points, without a run of its own.

    ``points(moment, alters, *args)`` names them, where ``alters(point)`` says whether the run's
    edits do; ``read(moment, run, points, *args)`` answers.
    """

    points: Callable[..., Collection[str]]
    read: Callable[..., Any]


Question = tuple[Reading, tuple[Any, ...]]  # and its arguments

_READ: dict[Any, Reading] = {
    routing_of: Reading(
        lambda *_: (),
        lambda moment, run, _: routing_in(run, moment.tokens),
    ),
    written: Reading(
        lambda moment, alters: written_points(moment.model.config, alters),
        lambda _, run, points: {name: run.value(name) for name in points},
    ),
}


class Moment:
    """A prompt in a model, clean and with edits.

        >>> moment = Moment(model, model.prompt("two times two"))       # doctest: +SKIP
        >>> moment.clean(routing_of).expert.shape                       # doctest: +SKIP

    `pictures` are the pictures of the prompt as given, `boxes` (left, top, right, bottom, name) of
    what they show, where that is known. `kept` is for what views computed of it, by question.

    Raises:
        ValueError: a prompt of several rows, or edits that model or prompt cannot have.
    """

    def __init__(
        self,
        model: Llama4,
        prompt: Prompt,
        edits: Sequence[Edit] = (),
        *,
        pictures: Sequence[Any] = (),
        boxes: Sequence[tuple[float, float, float, float, str]] = (),
    ):
        self.model = model
        self.prompt = prompt
        self.pictures = list(pictures)
        self.boxes = list(boxes)
        self.tokens: list[str] = tokens_of(prompt)  # of the one row
        self.words = [visible(token) for token in self.tokens]
        self.edits = tuple(edits)
        check(self.edits, model.config, len(self.tokens))
        self._clean: dict[Any, Any] = {}
        self._edited: dict[Any, Any] = {}
        self.kept: dict[Any, Any] = {}
        self._runs: dict[bool, tuple[set[str], Edited]] = {}  # what they keep; True: with the edits
        self._asked: set[Question] = set()
        self._foreseen: set[Question] = set()  # those of the moment before

    def with_edits(self, edits: Sequence[Edit]) -> "Moment":
        """Return the same moment with other edits; what is known of the clean run stays."""
        other = Moment(self.model, self.prompt, edits, pictures=self.pictures, boxes=self.boxes)
        other._clean = self._clean
        other._foreseen = self._asked or self._foreseen
        if "replay" in self.__dict__:
            other.__dict__["replay"] = self.replay
        return other

    @property
    def first_layer(self) -> int:
        """The layer to look at first: that with the first router, if there is one."""
        return min(self.model.config.routed_layers, default=0)

    @property
    def bounds(self) -> dict[str, int]:
        """How many there are of what can be selected."""
        config = self.model.config
        return {
            "token": len(self.tokens),
            "layer": config.num_hidden_layers,
            "head": config.num_attention_heads,
            "expert": config.num_local_experts,
        }

    @property
    def changed(self) -> set[str]:
        """The points that the edits change."""
        return {*changes_of(self.edits, self.model.config)}

    def called(self, token: int) -> str:
        """Return what a token of the prompt is called in texts, as boards call it."""
        return f"token {token} ‘{self.words[token]}’"

    def word(self, idx: int) -> str:
        """Return a token of the vocabulary as views show it; without a tokenizer, its number."""
        return word_of(self.model.tokenizer, idx)

    def likeliest(self, *probabilities: Float[torch.Tensor, " v"], by: int = 0) -> list[list[Any]]:
        """Return the words that are likeliest in any of some distributions, with their per cent.

        Args:
            by: which distribution orders them.
        """
        highest = torch.stack([each.to(probabilities[0].device) for each in probabilities]).amax(0)
        ids = highest.topk(_TOP).indices.tolist()
        ids.sort(key=lambda i: -float(probabilities[by][i]))
        return [[self.word(i), *(round(100 * float(p[i]), 1) for p in probabilities)] for i in ids]

    @cached_property
    def replay(self) -> Replay:
        """The clean run, from which edited ones begin."""
        with self.computing():
            return Replay(self.model, self.prompt, progress=False)  # views show their own

    @property
    def edited_run(self) -> Edited:
        """The run with the edits, from where they begin, with what they did."""
        return self._run(bool(self.edits))

    def _run(self, is_edited: bool, *questions: Question) -> Edited:
        """Return the clean or the edited run, which keeps what answers some questions.

        It is made again for a question that nobody asked of the moment before.
        """
        with self.computing():
            self._asked |= {*questions}
            keep, run = self._runs.get(is_edited, (set(), None))
            if run is None or not keep >= self._points(is_edited, *questions):
                keep = self._points(is_edited, *self._asked, *self._foreseen)
                run = self.replay.edited(self.edits if is_edited else (), keep=keep)
                self._runs[is_edited] = keep, run
            return run

    def _points(self, is_edited: bool, *questions: Question) -> set[str]:
        changed = self.changed if is_edited else set()
        found = (reading.points(self, changed.__contains__, *args) for reading, args in questions)
        return set().union(*found)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute when no other view does, and what is short with one thread of torch's.

        Of the others, those that wait for work would take the processors that the browser needs.
        In a notebook, compiled experts, whose loading keeps Python busy for most of a second, come
        when all is drawn; until then the plain ones do.

        Raises:
            KeyboardInterrupt: the kernel was interrupted since the outermost such block began.
        """
        with _TURN, stoppable():
            if running_loop():
                for part in (probe, attention):
                    part.LOADING.put_off(_REST)
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if len(self.tokens) <= _SHORT else threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    @contextmanager
    def running_edited(self) -> Iterator[None]:
        """Run the model with the edits, alone, inside the block."""
        with self.computing(), warnings.catch_warnings():
            # Not every question reads all that is edited, such as the logits.
            warnings.filterwarnings("ignore", "the change of .* was never made")
            with edited(self.model, self.edits, {"clean": self.prompt}):
                yield

    def clean(self, compute: Callable[..., T] | Reading, *args: Any, **options: Any) -> T:
        """Return ``compute(model, prompt, *args, **options)``, computed once."""
        return self._known(False, compute, args, options)

    def edited(self, compute: Callable[..., T] | Reading, *args: Any, **options: Any) -> T:
        """Return the same of a run with the edits; without any, of the clean one."""
        return self._known(bool(self.edits), compute, args, options)

    def runs(self, compute: Callable[..., T] | Reading, *args: Any) -> list[tuple[str, T]]:
        """Return `clean` and `edited` under these names; without edits the clean one, nameless."""
        if not self.edits:
            return [("", self.clean(compute, *args))]
        return [("clean", self.clean(compute, *args)), ("edited", self.edited(compute, *args))]

    def _known(self, is_edited: bool, compute: Any, args: Any, options: Any) -> Any:
        def make() -> Any:
            reading = _READ.get(compute, compute)
            if isinstance(reading, Reading):
                question = reading, args
                run, points = self._run(is_edited, question), self._points(is_edited, question)
                return reading.read(self, run, points, *args)
            if run := options.get("kept"):  # which is all that the answer takes
                kept = options | {"kept": self._known(is_edited, run, (), {})}
                return compute(self.model, self.prompt, *args, **kept)
            with torch.no_grad(), self.running_edited() if is_edited else nullcontext():
                return compute(self.model, self.prompt, *args, **options)

        known = self._edited if is_edited else self._clean
        return self._once(known, (compute, args, tuple(sorted(options.items()))), make)

    def once(self, question: Any, make: Callable[[], T]) -> T:
        """Return what was `kept` under a question, or is made now and kept."""
        return self._once(self.kept, question, make)

    def _once(self, known: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
        with self.computing():
            if key not in known:
                known[key] = make()
            return known[key]
