"""One moment of a model: a prompt, the edits, and what was computed of both, each once.

With `explore` this is the only module here that needs torch; views ask it for arrays.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

from llama4_lab.analysis.routing import routing_in, routing_of
from llama4_lab.edits import Edit, check, edited
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.replay import Edited, Replay
from llama4_widgets.words import visible

T = TypeVar("T")
_READ: dict[Any, Any] = {routing_of: routing_in}  # what the runs that are there know already


class Moment:
    """A prompt in a model, clean and with edits.

        >>> moment = Moment(model, model.prompt("two times two"))       # doctest: +SKIP
        >>> moment.clean(routing_of).expert.shape                       # doctest: +SKIP

    `pictures` are the pictures of the prompt as given, `boxes` (left, top, right, bottom, name) of
    what they show, where that is known.

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
        self.tokens: list[str] = prompt.tokens  # of the one row
        self.words = [visible(token) for token in self.tokens]
        self.edits = tuple(edits)
        check(self.edits, model.config, len(self.tokens))
        self._clean: dict[Any, Any] = {}
        self._edited: dict[Any, Any] = {}

    def with_edits(self, edits: Sequence[Edit]) -> "Moment":
        """Return the same moment with other edits; what is known of the clean run stays."""
        other = Moment(self.model, self.prompt, edits, pictures=self.pictures, boxes=self.boxes)
        other._clean = self._clean
        if "replay" in self.__dict__:
            other.__dict__["replay"] = self.replay
        return other

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

    @cached_property
    def replay(self) -> Replay:
        """The clean run, from which edited ones begin."""
        return Replay(self.model, self.prompt)

    @cached_property
    def edited_run(self) -> Edited:
        """The run with the edits, from where they begin, with what they did."""
        return self.replay.edited(self.edits)

    def clean(self, compute: Callable[..., T], *args: Any, **options: Any) -> T:
        """Return ``compute(model, prompt, *args, **options)``, computed once."""
        if (read := _READ.get(compute)) is not None:
            return self._once(self._clean, read, lambda: read(self.replay.edited(()), self.tokens))
        return self._known(self._clean, compute, args, options)

    def edited(self, compute: Callable[..., T], *args: Any, **options: Any) -> T:
        """Return the same of a run with the edits; without any, of the clean one."""
        if not self.edits:
            return self.clean(compute, *args, **options)
        if (read := _READ.get(compute)) is not None:
            return self._once(self._edited, read, lambda: read(self.edited_run, self.tokens))
        with edited(self.model, self.edits, {"clean": self.prompt}):
            return self._known(self._edited, compute, args, options)

    @torch.no_grad()
    def _known(
        self, known: dict[Any, Any], compute: Callable[..., T], args: Any, options: Any
    ) -> T:
        key = (compute, args, tuple(sorted(options.items())))
        return self._once(known, key, lambda: compute(self.model, self.prompt, *args, **options))

    def _once(self, known: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
        if key not in known:
            known[key] = make()
        return known[key]
