"""The views of the lab, one file each: what is drawn of a moment, and a sentence about it."""

from llama4_widgets.view import View
from llama4_widgets.views.ablate import AblateView
from llama4_widgets.views.router import RouterView

VIEWS: dict[str, type[View]] = {"router": RouterView, "ablate": AblateView}
