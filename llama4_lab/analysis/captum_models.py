"""A model and its tokenizer in the shapes that captum's methods for language models expect."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llama4_lab.generate import tokens as decode_tokens
from llama4_lab.model import Llama4


def for_captum(model: Llama4) -> tuple[nn.Module, Any]:
    """Dress a model and its tokenizer for captum's ``LLMAttribution`` and its kin.

    A method of captum takes the module, a text input takes the tokenizer; a layer is one of
    ``model``'s own (``model.embed_tokens``). captum's reuse of cached outputs needs a generation
    class of transformers, so turn it off:

        module, tokenizer = for_captum(model)
        explain = LLMAttribution(FeatureAblation(module), tokenizer)
        text = TextTokenInput("Two and two make", tokenizer)
        explain.attribute(text, target=" four", use_cached_outputs=False).seq_attr

    Raises:
        ValueError: the model came without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer to read text with: load it from a folder that has one, "
            "or use token_features"
        )
    return _CaptumModel(model), _CaptumTokenizer(model.tokenizer)


class _CaptumModel(nn.Module):
    """Answers as a causal language model of transformers does."""

    def __init__(self, model: Llama4):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids, None, attention_mask))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 25,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        heat = (1.0 if temperature is None else temperature) if do_sample else 0.0
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        share = 1.0 if top_p is None else top_p
        new = decode_tokens(self.model, prompt, max_new_tokens, temperature=heat, top_p=share)
        return torch.cat([input_ids, torch.stack([*new], dim=1)], dim=1)


class _CaptumTokenizer:
    """Speaks the part of transformers' tokenizer that captum asks for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(
        self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> Any:
        ids = self._ids(text, add_special_tokens)
        return torch.tensor([ids]) if return_tensors == "pt" else ids

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        start = [self.tokenizer.bos_id] if add_special_tokens else []
        return [*start, *self.tokenizer.encode(text)]

    def decode(self, ids: int | Sequence[int] | Tensor) -> str:
        return self.tokenizer.decode(torch.as_tensor(ids).flatten().tolist())

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        show = self.tokenizer.token_text
        return show(ids) if isinstance(ids, int) else [show(idx) for idx in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        ids = self.tokenizer.encode(tokens, special=True)
        if len(ids) != 1:
            raise ValueError(f"{tokens!r} is not one token: this tokenizer makes {len(ids)} of it")
        return ids[0]

    def __call__(
        self, text: str, return_offsets_mapping: bool = True, add_special_tokens: bool = False
    ) -> dict[str, list]:
        ids = self._ids(text, add_special_tokens)
        ends = [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        return {"input_ids": ids, "offset_mapping": [*zip([0, *ends], ends, strict=False)]}
