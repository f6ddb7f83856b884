"""Train a small byte-level BPE tokenizer in Llama 4's manner: its pattern, its special names."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llama4_lab.prompt.tokenizer import PATTERN as LLAMA4_PATTERN
from llama4_lab.train.corpus import read_documents

# Digits stand alone, so that a model of this size can learn to add.
PATTERN = LLAMA4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_SPECIAL = """
begin_of_text end_of_text header_start header_end eom eot step python_start python_end
finetune_right_pad image_start image_end tile_x_separator tile_y_separator image patch
"""
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _SPECIAL.split()) + tuple(
    f"<|reserved_special_token_{index}|>" for index in range(16)
)
ROLES = ("system", "user", "assistant", "ipython")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, words: Iterable[str] = ()
) -> Tokenizer:
    """Train byte-level BPE on `texts`; special tokens take the last ids of the vocabulary.

    Every one of `words` becomes one token, lower case and capitalised, alone and after a space. As
    in tiktoken, a piece of text that is in the vocabulary is taken whole before any merge is tried,
    so such a word needs no merges. No begin-of-text token is added when encoding.
    """
    cases = {case for word in words for case in (word, word.capitalize())}
    variants = sorted(cases | {" " + case for case in cases})
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wanted = []
    for variant in variants:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(variant)
        if len(pieces) != 1:
            raise ValueError(f"word {variant!r} cannot be one token: it is split before merging")
        wanted.append(pieces[0][0])
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 256 + len(wanted):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes, {len(wanted)} forms of the words "
            f"and {len(SPECIAL_TOKENS)} special tokens need "
            f"{256 + len(wanted) + len(SPECIAL_TOKENS)}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    state = json.loads(tokenizer.to_str())
    model = state["model"]
    learnt, added = _make_room(sorted(model["vocab"], key=model["vocab"].get), wanted, room)
    if len(learnt) + len(added) < room:
        raise ValueError(
            f"the texts give {len(learnt) + len(added) + len(SPECIAL_TOKENS)} tokens of the "
            f"{vocab_size} asked for: give more text or a smaller vocab_size"
        )
    model["vocab"] = {token: index for index, token in enumerate(learnt + added)}
    known = set(learnt)
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in known]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _make_room(tokens: list[str], wanted: list[str], room: int) -> tuple[list[str], list[str]]:
    """Drop the last tokens learnt until those words fit in that have no token; return both.

    >>> _make_room(["a", "b", "ab", "ba"], wanted=["bab", "ba"], room=4)
    (['a', 'b'], ['ba', 'bab'])
    """
    kept = len(tokens)
    while kept + len(added := set(wanted) - set(tokens[:kept])) > room:
        kept -= 1
    return tokens[:kept], sorted(added)


def balanced_sample(folder: Path | str, megabytes: float = 2.5) -> Iterator[str]:
    """Yield about the same amount of every domain of a built corpus.

    A file's documents lie in random order, so its beginning is a fair sample of the domain.
    """
    files = sorted(Path(folder).glob("*.train.txt"))
    if not files:
        raise FileNotFoundError(f"no *.train.txt in {folder}: build the corpus there first")
    for file in files:
        room = megabytes * 1e6
        for document in read_documents(file):
            yield document
            room -= len(document.encode())
            if room < 0:
                break
