"""What is selected: one place that all views read and write."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import traitlets

FIELDS = ("token", "layer", "head", "expert")


class Selection(traitlets.HasTraits):
    """Token, layer, head and expert that people look at, shared by views.

    Set a trait, and every view follows; a click in a view sets it. `bounds` says how many there
    are of each.
    """

    token = traitlets.Int(0, help="position in the prompt")
    layer = traitlets.Int(0, help="layer of the text model")
    head = traitlets.Int(0, help="query head")
    expert = traitlets.Int(0, help="routed expert")
    bounds = traitlets.Dict(help="how many there are of each")
    shared = traitlets.Dict(help="all fields as browsers know them, with the count of changes")

    def __init__(self, **choice: Any):
        self.group = uuid4().hex
        self._is_following = False
        super().__init__(**choice)
        self._tell()

    @traitlets.validate(*FIELDS)
    def _check(self, proposal: Any) -> int:
        field, value = proposal["trait"].name, proposal["value"]
        count = self.bounds.get(field)
        if count is not None and not 0 <= value < count:
            raise traitlets.TraitError(
                f"{field} {value} is out of range: there are {count} {field}s (0 to {count - 1})"
            )
        return value

    @traitlets.observe(*FIELDS)
    def _tell(self, _change: Any = None) -> None:
        if not self._is_following:
            count = self.shared.get("seq", 0) + 1
            self.shared = {field: getattr(self, field) for field in FIELDS} | {"seq": count}

    @traitlets.observe("bounds")
    def _stay_inside(self, _change: Any) -> None:
        for field, count in self.bounds.items():
            if getattr(self, field) >= count:
                setattr(self, field, count - 1)

    def follow(self, chosen: Mapping[str, int]) -> None:
        """Take over what was chosen in a browser, unless something newer is known."""
        if chosen.get("seq", 0) <= self.shared.get("seq", 0):
            return
        with self._following(), self.hold_trait_notifications():
            for field in FIELDS:
                setattr(self, field, chosen.get(field, getattr(self, field)))
        self.shared = {field: getattr(self, field) for field in FIELDS} | {"seq": chosen["seq"]}

    @contextmanager
    def _following(self) -> Iterator[None]:
        self._is_following = True
        try:
            yield
        finally:
            self._is_following = False
