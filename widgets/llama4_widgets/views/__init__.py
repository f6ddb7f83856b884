"""The views of the lab, one file each: what is drawn of a moment, and a sentence about it."""

from llama4_widgets.view import View
from llama4_widgets.views.ablate import AblateView
from llama4_widgets.views.attention import AttentionView
from llama4_widgets.views.attribution import AttributionView
from llama4_widgets.views.counterfactual import CounterfactualView
from llama4_widgets.views.experts import ExpertsView
from llama4_widgets.views.generate import GenerateView
from llama4_widgets.views.image import ImageView
from llama4_widgets.views.lens import LensView
from llama4_widgets.views.planner import PlannerView
from llama4_widgets.views.router import RouterView

VIEWS: dict[str, type[View]] = {
    "router": RouterView,
    "experts": ExpertsView,
    "attention": AttentionView,
    "image": ImageView,
    "lens": LensView,
    "attribution": AttributionView,
    "ablate": AblateView,
    "generate": GenerateView,
    "counterfactual": CounterfactualView,
    "planner": PlannerView,
}
