"""Text to token ids and back, from Hugging Face's ``tokenizer.json`` or Meta's ``tokenizer.model``.

Llama 4's tokenizer is a byte-level BPE of 200,000 ranks followed by 2,048 special tokens. Read
`llama4_lab.prompt.chat` next.
"""

import base64
import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

NUM_RANKS = 200_000
PATTERN = "|".join(  # cuts a text into words; merges never cross a cut (called o200k by tiktoken)
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"
HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"
END_OF_MESSAGE, END_OF_TURN = "<|eom|>", "<|eot|>"
REQUIRED = (BEGIN, END, HEADER_START, HEADER_END, END_OF_MESSAGE, END_OF_TURN, PAD)
_LLAMA_3 = {  # what Llama 3 calls them, which some dense models of Llama 4's architecture use
    HEADER_START: ("<|start_header_id|>",),
    HEADER_END: ("<|end_header_id|>",),
    END_OF_TURN: ("<|eot_id|>",),
    END_OF_MESSAGE: ("<|eom_id|>", "<|eot_id|>"),
    PAD: ("<|finetune_right_pad_id|>", END),
}

# tiktoken's regular expressions overflow their stack on a million spaces; Meta cuts here as well
LONGEST_PIECE = 400_000  # characters


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE with Llama 4's special tokens, or with Llama 3's that mean the same.

    The two engines differ in `encode_plain` (text without special tokens to ids) and `plain_bytes`
    (one such id to its bytes); everything else is shared.

    Raises:
        ValueError: Llama 4's text tokens are not among the special ones.
    """

    file: Path  # that it was read from
    vocab_size: int
    special: dict[str, int] = field(repr=False)
    encode_plain: Callable[[str], list[int]] = field(repr=False)
    plain_bytes: Callable[[int], bytes] = field(repr=False)
    unused: range = range(0)  # ids behind the last one, of embeddings that no text has
    text: str | None = field(default=None, repr=False)  # tokenizer.json, if that is no file yet

    def __post_init__(self) -> None:
        if missing := [name for name in REQUIRED if self._name_here(name) is None]:
            raise ValueError(
                f"{self.file} lacks Llama 4's special tokens {', '.join(missing)}: "
                "use the tokenizer that came with the checkpoint"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes read the file again."""
        if self.text is not None:
            return Tokenizer.from_text, (self.text, self.file), {"unused": self.unused}
        if self.file.suffix == ".json":
            return Tokenizer.from_json, (self.file,), {"unused": self.unused}
        ranks = self.vocab_size - len(self.special)
        return Tokenizer.from_ranks, (self.file, ranks), {"unused": self.unused}

    def __deepcopy__(self, memo: Any) -> "Tokenizer":
        return self  # nothing in it changes

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint folder's ``tokenizer.json``, or else its ``tokenizer.model``.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: the file is broken or belongs to another family of models.
        """
        for name, read in (("tokenizer.json", cls.from_json), ("tokenizer.model", cls.from_ranks)):
            if (path := Path(folder) / name).is_file():
                return read(path)
        raise FileNotFoundError(
            f"no tokenizer in {folder}: it needs Hugging Face's tokenizer.json "
            "or Meta's tokenizer.model"
        )

    @classmethod
    def from_json(cls, path: str | Path) -> "Tokenizer":
        """Read a ``tokenizer.json`` of the tokenizers library."""
        return cls._from_json(Path(path), None)

    @classmethod
    def from_text(cls, text: str, path: Path) -> "Tokenizer":
        """Take the text of a ``tokenizer.json`` that was made from another file."""
        return cls._from_json(path, text)

    @classmethod
    def _from_json(cls, path: Path, text: str | None) -> "Tokenizer":
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as Engine

        try:
            engine = Engine.from_file(str(path)) if text is None else Engine.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise _unreadable(path, str(error)) from error
        engine.no_padding()
        engine.no_truncation()
        byte_of = _byte_alphabet()
        if not isinstance(engine.model, models.BPE) or any(
            engine.token_to_id(char) is None for char in byte_of
        ):
            raise _unreadable(path, "it is no byte-level BPE with all 256 bytes")

        added = engine.get_added_tokens_decoder()
        special = {
            token.content: idx
            for idx, token in added.items()
            if token.special or re.fullmatch(r"<\|.*\|>", token.content)
        }
        engine.add_special_tokens([AddedToken(name, special=True) for name in special])
        engine.encode_special_tokens = True  # the engine reads them as text; `encode` finds them

        def encode_plain(text: str) -> list[int]:
            return engine.encode(text, add_special_tokens=False).ids

        def plain_bytes(idx: int) -> bytes:
            token = engine.id_to_token(idx) or ""  # ids may have gaps
            return token.encode() if idx in added else bytes(byte_of[char] for char in token)

        vocab_size = max([engine.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        return cls(path, vocab_size, special, encode_plain, plain_bytes, text=text)

    @classmethod
    def from_ranks(cls, path: str | Path, num_ranks: int = NUM_RANKS) -> "Tokenizer":
        """Read Meta's ``tokenizer.model``: a line for each rank, base64 bytes and the rank.

        The special tokens are not in the file; they follow the last rank.
        """
        import tiktoken

        path = Path(path)
        special = {name: num_ranks + i for i, name in enumerate(special_names())}
        encoding = tiktoken.Encoding(
            path.name,
            pat_str=PATTERN,
            mergeable_ranks=_read_ranks(path, num_ranks),
            special_tokens=special,
        )

        def encode_plain(text: str) -> list[int]:
            return [
                idx
                for start in range(0, len(text), LONGEST_PIECE)
                for idx in encoding.encode_ordinary(text[start : start + LONGEST_PIECE])
            ]

        vocab_size = num_ranks + len(special)
        return cls(path, vocab_size, special, encode_plain, encoding.decode_single_token_bytes)

    @property
    def content(self) -> bytes:
        """What tells it from others: the bytes of its file."""
        return self.file.read_bytes() if self.text is None else self.text.encode()

    @property
    def bos_id(self) -> int:
        return self.id_of(BEGIN)

    @property
    def pad_id(self) -> int:
        return self.id_of(PAD)

    @property
    def patch_id(self) -> int:
        """Id of ``<|patch|>``, the token that an image feature replaces."""
        return self.id_of("<|patch|>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: of the document, of a tool call, of a turn."""
        return tuple(self.id_of(name) for name in (END, END_OF_MESSAGE, END_OF_TURN))

    def id_of(self, name: str) -> int:
        """Look up a special token by Llama 4's name for it, or its own."""
        if (here := self._name_here(name)) is None:
            raise ValueError(f"the tokenizer {self.file} has no special token {name}")
        return self.special[here]

    def _name_here(self, name: str) -> str | None:
        names = (name, *_LLAMA_3.get(name, ()))
        return next((each for each in names if each in self.special), None)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Turn text into ids, without a begin-of-text token.

        Names of special tokens in the text are ordinary characters, so that nobody can write a
        header into a message, unless `special` asks for them.
        """
        # tokenizers refuses half a surrogate pair, which a browser can send; it becomes U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not special:
            return self.encode_plain(text)
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            ids += [self.special[piece]] if piece in self.special else self.encode_plain(piece)
        return ids

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """Turn ids into text, special tokens by name or left out; broken UTF-8 becomes U+FFFD."""
        return "".join(self.stream(ids, special))

    def stream(self, ids: Iterable[int], special: bool = True) -> Iterator[str]:
        """Yield the text of `ids` as they come; a character waits for the last of its bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for idx in ids:
            if not special and (int(idx) in self._name_of or int(idx) in self.unused):
                continue
            if piece := decoder.decode(self.token_bytes(int(idx))):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def token_bytes(self, idx: int) -> bytes:
        """Give the bytes that one token stands for; of a special or unused token, a name.

        Raises:
            ValueError: no such token.
        """
        if idx in self.unused:
            return f"<|unused_{idx}|>".encode()
        if not 0 <= idx < self.vocab_size:
            raise ValueError(
                f"token {idx} is out of range: this tokenizer has {self.vocab_size} tokens "
                f"(0 to {self.vocab_size - 1})"
            )
        return self._name_of[idx].encode() if idx in self._name_of else self.plain_bytes(idx)

    def token_text(self, idx: int) -> str:
        r"""Show one token: bytes that are no whole character look like ``\xe4``."""
        return self.token_bytes(idx).decode("utf-8", "backslashreplace")

    @cached_property
    def _name_of(self) -> dict[int, str]:
        return {idx: name for name, idx in self.special.items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def special_names() -> list[str]:
    """List Llama 4's 2,048 special tokens in the order of their ids, from 200,000 on.

    >>> special_names()[80], special_names()[92]
    ('<|image_start|>', '<|patch|>')
    """
    names = [
        *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *("header_start", "header_end", "eom", "eot", "step"),
        *_reserved("text_post_train_", 0, 6),
        *("python_start", "python_end", "finetune_right_pad"),
        *_reserved("text_post_train_", 8, 69),  # there is no 6 and no 7
        *("image_start", "image_end"),
        *_reserved("vision_", 0, 2),
        *("tile_x_separator", "tile_y_separator"),
        *_reserved("vision_", 2, 6),
        "image",
        *_reserved("vision_", 6, 7),
        "patch",
        *_reserved("vision_", 7, 1048),
        *_reserved("reasoning_", 0, 8),
        *("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    return [f"<|{name}|>" for name in [*names, *_reserved("", 0, 2048 - len(names))]]


def _reserved(family: str, start: int, stop: int) -> list[str]:
    return [f"{family}reserved_special_token_{i}" for i in range(start, stop)]


def _byte_alphabet() -> dict[str, int]:
    """Map the characters that ``tokenizer.json`` writes for bytes: printable Latin-1 is itself,
    the other bytes are counted up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


def _read_ranks(path: Path, num_ranks: int) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise _unreadable(path, f"line {number} is not a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(num_ranks)):
        raise _unreadable(path, f"it has {len(ranks)} ranks, not {num_ranks} counted from 0")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _unreadable(path, f"it has no rank for {len(missing)} of the 256 bytes")
    return ranks


def _unreadable(path: Path, reason: str) -> ValueError:
    """Say why a file is not Llama 4's tokenizer, and name what it is if that can be seen."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        reason = "it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    elif b"<unk>" in head and path.suffix == ".model":
        reason = "it is a SentencePiece model, as Llama 1 and 2 have"
    return ValueError(
        f"{path} is not a Llama 4 tokenizer ({reason}): use the file that came with the checkpoint"
    )
