"""A tokenizer of 336 tokens with Llama 4's pattern and special names."""

import base64
from functools import cache
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from llama4_lab.prompt.tokenizer import PATTERN, Tokenizer

NUM_RANKS = 320
SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>"),
    *("<|eom|>", "<|eot|>", "<|step|>", "<|python_start|>", "<|python_end|>"),
    *("<|finetune_right_pad|>", "<|image_start|>", "<|image_end|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>"),
]
TEXTS = [
    *["Hello the circle\n\n\n\n"] * 20,
    "The user asks the assistant, and the system answers: user, system, assistant.\n\n",
    "Hello! What's the colour of the circle? The circle is red.\n",
    "for i in range(10):\n    print(i)\n",
]


@cache
def engine() -> Engine:
    """Train byte-level BPE whose ids are ranks, the special tokens after them."""
    trained = Engine(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    assert trained.get_vocab_size() == NUM_RANKS
    trained.add_special_tokens(SPECIAL)
    return trained


def small_tokenizer(folder: Path) -> Tokenizer:
    """Write ``tokenizer.json`` into a folder and read it."""
    engine().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def write_ranks(path: Path, tokens: list[bytes]) -> None:
    """Write tokens in the order of their ranks, as Meta does."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
