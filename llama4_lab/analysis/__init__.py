"""Arrays about a model: pure functions, figures are drawn elsewhere.

Who is chosen, how evenly and how closely: `routing`, `load`, `margins`. What experts prefer and
tell: `specialisation`, `vocabulary`, `transitions`, `saturation`. What each layer would say, and
which heads and experts wrote a logit: `lens`, `decomposition`. What brings an answer back, and a
token sent elsewhere: `patching`, `counterfactual`. captum's methods: `attribution`, with
`features` and `expert_features`, and `robustness`. Where tokens look, in texts and pictures:
`attention`, `vision`. Without experts, or with fewer bits: `pruning`, `quantisation`.
"""

from typing import TYPE_CHECKING

from llama4_lab.loading import on_demand

if not TYPE_CHECKING:
    __getattr__ = on_demand(__name__)
