"""Run a model and hand what happened to a view: the only module here that needs torch."""

from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.model import Llama4
from llama4_widgets.router import RouterExplorer

MAX_TOKENS = 4096  # more would make the views slow, and nobody reads that many words
_TEXT = """\
The old man looked at the sea.
def add(a, b):
    return a + b
12 + 7 = 19
Старик смотрел на море."""


def explore(model: Llama4, text: str = _TEXT, **choice: int) -> RouterExplorer:
    """Show which experts each token of a text chooses; other texts can be typed in.

    Args:
        choice: `layer` and `token` to begin with.

    Raises:
        ValueError: a model without experts or tokenizer, or a text of more than 4096 tokens.
    """

    def run(text: str) -> Routing:
        prompt = model.prompt(text)
        if (count := len(prompt.tokens)) > MAX_TOKENS:
            raise ValueError(
                f"this text has {count} tokens, the explorer shows at most {MAX_TOKENS}: shorten it"
            )
        return routing_of(model, prompt)

    return RouterExplorer(run(text), text, run, **choice)
