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
            self._share({"seq": self.shared.get("seq", 0) + 1})

    def _share(self, chosen: Mapping[str, int]) -> None:
        """Tell of what is selected, after what was `chosen` elsewhere, or by nobody."""
        own = {field: getattr(self, field) for field in FIELDS}
        self.shared = own | {"seq": chosen["seq"]}

    @traitlets.observe("bounds")
    def _stay_inside(self, change: Any) -> None:
        """Keep what there is, else choose the last."""
        for field, count in self.bounds.items():
            if getattr(self, field) >= count:
                setattr(self, field, count - 1)
        if isinstance(change["old"], dict) and change["old"].get("token") == 1:
            self.token = min(1, self.bounds["token"] - 1)  # nobody chose the first: it was alone

    def follow(self, chosen: Mapping[str, int]) -> None:
        """Take over what was chosen elsewhere, unless something newer is known.

        Where less is known of here, as in the shorter of two prompts, it is the last there is.
        """
        if chosen.get("seq", 0) <= self.shared.get("seq", 0):
            return
        with self._following(), self.hold_trait_notifications():
            for field in FIELDS:
                value = chosen.get(field, getattr(self, field))
                setattr(self, field, self._inside(field, value))
        self._share(chosen)

    def hear(self, chosen: Mapping[str, int]) -> None:
        """Follow a browser, and tell it as news where that is something else than it chose.

        It listens to what has a higher count than its own: it may have chosen before it heard of
        what was chosen here, or what there no longer is.
        """
        if chosen.get("seq") == self.shared["seq"] and chosen != self.shared:
            chosen = {**chosen, "seq": chosen["seq"] + 1}
        self.follow(chosen)
        if chosen.get("seq") == self.shared["seq"] and chosen != self.shared:
            self.follow(self.shared | {"seq": chosen["seq"] + 1})

    def _inside(self, field: str, value: int) -> int:
        return min(value, self.bounds.get(field, value + 1) - 1)

    @contextmanager
    def _following(self) -> Iterator[None]:
        self._is_following = True
        try:
            yield
        finally:
            self._is_following = False


class Mirror(Selection):
    """Moves with another selection, of a run that may have less to select, and moves that one.

    Browsers have one selection for both: what it tells them is that of the other, in full.
    """

    def __init__(self, of: Selection):
        super().__init__()
        self._of = of
        self.group = of.group
        of.observe(lambda change: self.follow(change["new"]), "shared")
        self.observe(lambda change: of.follow(change["new"]), "shared")
        self.follow(of.shared | {"seq": max(of.shared["seq"], self.shared["seq"] + 1)})

    def _share(self, chosen: Mapping[str, int]) -> None:
        meant = dict(self.shared) | dict(chosen)
        for field in FIELDS:
            own = getattr(self, field)
            if self._inside(field, meant.get(field, own)) != own:
                meant[field] = own
        self.shared = meant

    @traitlets.observe("bounds")
    def _stay_inside(self, _change: Any) -> None:
        with self._following():  # what is less here leaves the other where it is
            for field, count in self.bounds.items():
                setattr(self, field, min(self._of.shared[field], count - 1))
