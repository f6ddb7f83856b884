"""Turn the corpus's text files into flat files of token ids for training."""

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from llama4_lab.prompt.tokenizer import END
from llama4_lab.train.corpus import read_documents, write_atomically

_BATCH = 512


def encode(folder: Path | str, tokenizer: Tokenizer) -> dict:
    """Write `{domain}.{train,held}.bin` beside the texts, and `meta.json`, which is returned.

    A `.bin` holds little-endian uint16 ids, each document closed by `<|end_of_text|>`; a special
    token spelt out in a text stays plain text. `meta.json` counts tokens, UTF-8 bytes (without
    separators) and documents of each file, so that a loss in nats a token can be told in bits a
    byte, and names the tokenizer by the hash of its `to_str()`.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.train.txt")) + sorted(folder.glob("*.held.txt"))
    if not files:
        raise FileNotFoundError(f"no *.train.txt in {folder}: build the corpus there first")
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(
            f"a vocabulary of {tokenizer.get_vocab_size()} does not fit into uint16: "
            "use a tokenizer of at most 65536 tokens"
        )
    end = tokenizer.token_to_id(END)
    meta = {
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": end,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "files": {},
    }
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    for file in tqdm(files, desc="encode", unit="file"):
        documents = read_documents(file)
        parts = []
        for start in range(0, len(documents), _BATCH):
            for encoding in plain.encode_batch_fast(documents[start : start + _BATCH]):
                parts.append(np.array([*encoding.ids, end], dtype="<u2"))
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype="<u2")
        write_atomically(file.with_suffix(".bin"), ids.tobytes())
        meta["files"][file.stem] = {
            "tokens": len(ids),
            "bytes": sum(len(text.encode()) for text in documents),
            "documents": len(documents),
        }
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())
    return meta
