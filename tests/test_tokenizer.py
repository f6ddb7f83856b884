"""Text to ids and back, with a small tokenizer and, where its file is at hand, Llama 4's own."""

import copy
import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
from small_tokenizer import NUM_RANKS, SPECIAL, engine, write_ranks
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Engine

from llama4_lab.prompt.chat import encode_chat
from llama4_lab.prompt.tokenizer import Tokenizer, special_names

STRINGS = [
    "",
    "Hello, the assistant's range(10)\r\n\n\tprint  ( i )   ",
    "ÄÖÜ ß straße naïve 日本語 กขค ملخص 👩‍🚀 \u200d",
    "1234567 3.14 ½ x²",
    "\x00\x7f\ufeff\u00ad",
    "DON'T don't I'LL we'Ve",
    "<|eot|><|header_start|>system<|header_end|>",
]


def find_real_file() -> Path | None:
    places = [Path(place) / "llama_models/llama4/tokenizer.model" for place in sys.path]
    if named := os.environ.get("LLAMA4_TOKENIZER"):
        places = [Path(named)]
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="module")
def llama4():
    if (path := find_real_file()) is None:
        pytest.skip("needs Meta's tokenizer.model: name it in LLAMA4_TOKENIZER")
    return Tokenizer.from_ranks(path)


@pytest.mark.parametrize("text", STRINGS)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


def test_both_file_formats_give_the_same_ids(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, [tokenizer.token_bytes(rank) for rank in range(NUM_RANKS)])
    from_ranks = Tokenizer.from_ranks(path, NUM_RANKS)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert from_ranks.encode(text) == ids
        assert from_ranks.decode(ids) == text
    assert from_ranks.vocab_size == NUM_RANKS + 2048
    assert from_ranks.bos_id == NUM_RANKS


def test_names_of_special_tokens_are_plain_text_unless_asked_for(tokenizer):
    text = "a<|eot|>b<|unknown|>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
    ids = tokenizer.encode(text, special=True)
    assert [idx for idx in ids if idx >= NUM_RANKS] == [tokenizer.special["<|eot|>"]]
    assert ids[1] == tokenizer.special["<|eot|>"]


def test_a_special_name_that_the_file_does_not_mark_is_special_too(tmp_path):
    loose = Engine.from_str(engine().to_str())
    loose.add_tokens([AddedToken("<|loose|>", special=False), "Zürich"])
    loose.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    loose_id = tokenizer.special["<|loose|>"]
    assert loose_id not in tokenizer.encode("<|loose|>")
    assert tokenizer.encode("<|loose|>", special=True) == [loose_id]
    ids = tokenizer.encode("to Zürich")
    assert ids[-1] == tokenizer.vocab_size - 1  # a word that was added is still a word
    assert tokenizer.decode(ids) == "to Zürich"
    loose.add_special_tokens(["<|loose|>er"])
    loose.save(str(tmp_path / "tokenizer.json"))
    longer = Tokenizer.from_folder(tmp_path)
    assert longer.encode("<|loose|>er", special=True) == [longer.special["<|loose|>er"]]


def test_a_file_that_puts_begin_of_text_in_front_does_so_for_no_text(tokenizer, tmp_path):
    real = Engine.from_str(engine().to_str())  # as Llama 4's own file
    begin = ("<|begin_of_text|>", tokenizer.bos_id)
    real.post_processor = processors.TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    assert real.encode("Hello").ids[0] == tokenizer.bos_id
    real.save(str(tmp_path / "tokenizer.json"))
    for special in (False, True):
        found = Tokenizer.from_folder(tmp_path).encode("Hello<|eot|>", special)
        assert found == tokenizer.encode("Hello<|eot|>", special)


def test_truncation_and_padding_saved_in_the_file_are_off(tmp_path):
    short = Engine.from_str(engine().to_str())
    short.enable_truncation(2)
    short.enable_padding(length=50)
    short.save(str(tmp_path / "tokenizer.json"))
    text = "What's the colour of the circle?"
    assert Tokenizer.from_folder(tmp_path).encode(text) == engine().encode(text).ids


def test_ids_have_names(tokenizer):
    special = {name: NUM_RANKS + i for i, name in enumerate(SPECIAL)}
    assert tokenizer.special == special
    assert tokenizer.vocab_size == NUM_RANKS + len(SPECIAL)
    assert tokenizer.bos_id == special["<|begin_of_text|>"]
    assert tokenizer.pad_id == special["<|finetune_right_pad|>"]
    assert tokenizer.patch_id == special["<|patch|>"]
    assert tokenizer.stop_ids == tuple(
        special[name] for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>")
    )
    with pytest.raises(ValueError, match=r"has no special token <\|fim_prefix\|>"):
        tokenizer.id_of("<|fim_prefix|>")


def test_a_token_shows_whole_characters_and_single_bytes(tokenizer):
    assert [tokenizer.token_text(idx) for idx in tokenizer.encode("ä the")] == [
        r"\xc3",
        r"\xa4",
        " the",
    ]
    assert tokenizer.token_text(tokenizer.bos_id) == "<|begin_of_text|>"
    assert tokenizer.token_bytes(tokenizer.encode("\n\n")[0]) == b"\n\n"


@pytest.mark.parametrize("idx", [-1, 336])
def test_a_token_out_of_range_is_named(tokenizer, idx):
    with pytest.raises(
        ValueError, match=rf"token {idx} is out of range: .* 336 tokens \(0 to 335\)"
    ):
        tokenizer.token_bytes(idx)


def test_ids_that_no_text_has_get_a_name(tokenizer):
    size = tokenizer.vocab_size
    wider = dataclasses.replace(tokenizer, unused=range(size, size + 2))
    ids = [*wider.encode("Hi"), size + 1, *wider.encode(" you")]
    for each in (wider, pickle.loads(pickle.dumps(wider)), copy.deepcopy(wider)):
        assert each.decode(ids) == f"Hi<|unused_{size + 1}|> you"
        assert each.decode(ids, special=False) == "Hi you"
    with pytest.raises(ValueError, match=f"token {size + 2} is out of range"):
        wider.token_bytes(size + 2)


def test_streaming_never_yields_half_a_character(tokenizer):
    text = "日本 ä👩‍🚀!"
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert all(pieces) and "\ufffd" not in "".join(pieces)
    assert len(pieces) > 4


def test_streaming_yields_a_character_with_its_last_byte(tokenizer):
    taken = []

    def ids():
        for idx in tokenizer.encode("aä"):
            taken.append(idx)
            yield idx

    stream = tokenizer.stream(ids())
    assert (next(stream), len(taken)) == ("a", 1)
    assert (next(stream), len(taken)) == ("ä", 3)


def test_bytes_that_never_become_a_character_are_replaced(tokenizer):
    half = tokenizer.encode("日")[:2]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([*half, *tokenizer.encode("x")]) == "\ufffdx"


def test_decoding_can_leave_special_tokens_out(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("Hello"), tokenizer.special["<|eot|>"]]
    assert tokenizer.decode(ids) == "<|begin_of_text|>Hello<|eot|>"
    assert tokenizer.decode(ids, special=False) == "Hello"


def test_half_a_surrogate_pair_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_a_million_spaces_are_encoded_from_ranks(tmp_path):
    tokens = [*(bytes([byte]) for byte in range(256)), *(b" " * 2**i for i in range(1, 11))]
    write_ranks(tmp_path / "tokenizer.model", tokens)
    tokenizer = Tokenizer.from_ranks(tmp_path / "tokenizer.model", len(tokens))
    assert tokenizer.decode(tokenizer.encode(" " * 1_000_000)) == " " * 1_000_000


def test_special_names_lie_where_llama_4_has_them():
    expected = {
        "begin_of_text": 0,
        "end_of_text": 1,
        "fim_suffix": 4,
        "header_start": 5,
        "header_end": 6,
        "eom": 7,
        "eot": 8,
        "step": 9,
        "text_post_train_reserved_special_token_5": 15,
        "python_start": 16,
        "python_end": 17,
        "finetune_right_pad": 18,
        "text_post_train_reserved_special_token_8": 19,
        "text_post_train_reserved_special_token_68": 79,
        "image_start": 80,
        "image_end": 81,
        "vision_reserved_special_token_1": 83,
        "tile_x_separator": 84,
        "tile_y_separator": 85,
        "vision_reserved_special_token_5": 89,
        "image": 90,
        "vision_reserved_special_token_6": 91,
        "patch": 92,
        "vision_reserved_special_token_7": 93,
        "vision_reserved_special_token_1047": 1133,
        "reasoning_reserved_special_token_7": 1141,
        "reasoning_thinking_start": 1142,
        "reasoning_thinking_end": 1143,
        "reserved_special_token_0": 1144,
        "reserved_special_token_903": 2047,
    }
    names = special_names()
    assert len(names) == len(set(names)) == 2048
    assert {name: names.index(f"<|{name}|>") for name in expected} == expected


def test_the_real_file_gives_the_published_ids(llama4):
    assert llama4.vocab_size == 202_048
    assert (llama4.bos_id, llama4.pad_id, llama4.patch_id) == (200_000, 200_018, 200_092)
    assert llama4.stop_ids == (200_001, 200_007, 200_008)
    assert llama4.encode("\n\n") == [368]
    assert llama4.encode("user") == [1556]
    assert llama4.encode("assistant") == [140_680]
    assert llama4.encode("Hi") == [25_181]
    for text in STRINGS:
        assert llama4.decode(llama4.encode(text)) == text


def write_json(path: Path, change) -> None:
    state = json.loads(engine().to_str())
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


def test_a_folder_without_a_tokenizer_says_which_files_it_needs(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer in .*tokenizer.json .*tokenizer.model"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", '{"version": ', r"EOF while parsing"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
        ("tokenizer.model", "\n\x0e\n\x05<unk>\x15\x00", r"SentencePiece model, as Llama 1 and 2"),
        ("tokenizer.model", "IQ== 0\nIg== 1\nI", r"line 3 is not a base64 token and its rank"),
        ("tokenizer.model", "!IQ== 0\n", r"line 1 is not a base64 token and its rank"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", r"it has 2 ranks, not 200000 counted from 0"),
    ],
)
def test_a_broken_or_foreign_file_is_explained(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{name} is not a Llama 4 tokenizer \(.*{reason}.*\): use"
    ):
        Tokenizer.from_folder(tmp_path)


def test_ranks_without_all_bytes_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, [bytes([byte]) for byte in range(100)])
    with pytest.raises(ValueError, match="no rank for 156 of the 256 bytes"):
        Tokenizer.from_ranks(path, 100)


@pytest.mark.parametrize("model", [models.WordPiece({"[UNK]": 0}), models.BPE({"a": 0}, [])])
def test_another_kind_of_tokenizer_is_refused(tmp_path, model):
    Engine(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="it is no byte-level BPE with all 256 bytes"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_of_another_family_are_refused(tmp_path):
    def rename(state):
        for token in state["added_tokens"]:
            token["content"] = token["content"].replace("header_start", "im_start")

    write_json(tmp_path / "tokenizer.json", rename)
    with pytest.raises(ValueError, match=r"lacks Llama 4's special tokens <\|header_start\|>: use"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_without_added_tokens_is_refused(tmp_path):
    write_json(tmp_path / "tokenizer.json", lambda state: state["added_tokens"].clear())
    with pytest.raises(ValueError, match="lacks Llama 4's special tokens"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("is_first", [True, False], ids=["Llama 3.0", "Llama 3.1"])
def test_llama_3_s_names_stand_for_those_that_mean_the_same(tokenizer, tmp_path, is_first):
    names = {
        "<|header_start|>": "<|start_header_id|>",
        "<|header_end|>": "<|end_header_id|>",
        "<|eot|>": "<|eot_id|>",
        "<|eom|>": "<|reserved_special_token_1|>" if is_first else "<|eom_id|>",
        "<|finetune_right_pad|>": "<|reserved|>" if is_first else "<|finetune_right_pad_id|>",
    }

    def rename(state):
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])

    write_json(tmp_path / "tokenizer.json", rename)
    theirs = Tokenizer.from_folder(tmp_path)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "you"}]
    assert encode_chat(theirs, chat).ids == encode_chat(tokenizer, chat).ids
    text = theirs.decode(encode_chat(theirs, chat).ids)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\nyou<|eot_id|>")
    end, eot = (tokenizer.special[f"<|{name}|>"] for name in ("end_of_text", "eot"))
    assert theirs.stop_ids == ((end, eot, eot) if is_first else tokenizer.stop_ids)
    assert theirs.pad_id == (end if is_first else tokenizer.pad_id)


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, [tokenizer.token_bytes(rank) for rank in range(NUM_RANKS)])
    from_ranks = Tokenizer.from_ranks(path, NUM_RANKS)
    for sent in (tokenizer, from_ranks):
        again = pickle.loads(pickle.dumps(sent))
        assert again.encode("Hello the circle") == sent.encode("Hello the circle")
        assert again.special == sent.special
        assert again.content == sent.content == sent.file.read_bytes()
        assert copy.deepcopy(sent) is sent
