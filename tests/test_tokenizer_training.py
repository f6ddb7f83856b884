"""The tokenizer that is trained for the shipped models."""

import pytest
from tokenizers import Tokenizer

from llama4_lab.prompt.tokenizer import Tokenizer as PromptTokenizer
from llama4_lab.train.scenes import WORDS
from llama4_lab.train.tokenizer import ROLES, SPECIAL_TOKENS, balanced_sample, train_tokenizer

TEXTS = [
    "What colour is the star at the top left? The star is red, and nothing else is there.\n",
    "def distance(points):\n    return sum(abs(point) for point in points)\n\n\n",
    "Der Hund schläft unter dem Tisch. Le chien dort sous la table. El perro duerme.\n",
    "Собака спит под столом, а кошка смотрит на неё.\n狗在桌子下面睡觉，猫看着它。\n",
]
WANTED = WORDS + ROLES
VOCAB_SIZE = 700


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, VOCAB_SIZE, WANTED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces,\ttab\r\n\n  and an end \n",
        "Größe, être, ñandú, ещё, 汉字，हिन्दी, ไทย, العربية, 한국어",
        "🦙🏽 e\u0301 \u200d \x00 \x7f \ufeff ½ Ⅷ ٣",
        "if x<=10: return 'It''s 12345.678e-9'  # no",
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>",
    ],
)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.encode("37 + 1485=٤٢").tokens[:2] == ["3", "7"]
    pieces = [
        piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a1485b 20") if piece.strip()
    ]
    assert pieces == ["a", "1", "4", "8", "5", "b", "Ġ", "2", "0"]
    assert not any(sum(c.isdigit() for c in token) > 1 for token in learnt(tokenizer))


def learnt(tokenizer: Tokenizer) -> list[str]:
    return [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]


def test_every_word_of_scenes_and_roles_is_one_token(tokenizer):
    for word in WANTED:
        for form in (word, word.capitalize(), " " + word, " " + word.capitalize()):
            assert len(tokenizer.encode(form).ids) == 1, form
    sentence = "What colour is the triangle?"
    assert len(tokenizer.encode(sentence).ids) == 6


def test_words_leave_the_learnt_merges_before_them_as_they_were(tokenizer):
    plain = train_tokenizer(TEXTS * 4, 400)
    order = sorted(plain.get_vocab(), key=plain.get_vocab().get)[: 400 - len(SPECIAL_TOKENS)]
    crowded = train_tokenizer(TEXTS * 4, 400, ["triangle", "diamond"])
    assert [crowded.id_to_token(idx) for idx in range(360)] == order[:360]
    added = {crowded.id_to_token(idx) for idx in range(360, 368)}
    assert added == {
        space + word
        for space in ("", "Ġ")
        for word in ("triangle", "Triangle", "diamond", "Diamond")
    }


def test_special_tokens_have_llama_4s_names_and_the_last_ids(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert len(SPECIAL_TOKENS) == 32
    first = VOCAB_SIZE - 32
    assert [tokenizer.id_to_token(first + idx) for idx in range(32)] == list(SPECIAL_TOKENS)
    assert SPECIAL_TOKENS[:6] == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eom|>",
        "<|eot|>",
    )
    assert SPECIAL_TOKENS[10:17] == (
        "<|image_start|>",
        "<|image_end|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
        "<|image|>",
        "<|patch|>",
        "<|reserved_special_token_0|>",
    )
    assert tokenizer.encode("<|patch|>").ids == [first + 15]
    assert tokenizer.encode("Hi").ids == tokenizer.encode("Hi", add_special_tokens=False).ids


def test_the_saved_file_reads_the_same_here_and_in_prompts(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompts = PromptTokenizer.from_folder(tmp_path)
    for text in (*TEXTS, "Unseen words, 1234 of them; ещё 汉字"):
        ids = tokenizer.encode(text).ids
        assert again.encode(text).ids == ids
        assert prompts.encode(text) == ids


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer(TEXTS * 4, VOCAB_SIZE, WANTED).to_str() == tokenizer.to_str()


def test_what_cannot_be_trained_is_told_with_the_numbers():
    with pytest.raises(ValueError) as error:
        train_tokenizer(TEXTS, 290, ["red"])
    assert str(error.value) == (
        "vocab_size 290 is too small: 256 bytes, 4 forms of the words and 32 special tokens need "
        "292"
    )
    with pytest.raises(ValueError, match=r"the texts give \d+ tokens of the 9000 asked for: give"):
        train_tokenizer(TEXTS, 9000)
    with pytest.raises(
        ValueError, match="word ' Top left' cannot be one token: it is split before"
    ):
        train_tokenizer(TEXTS, 400, ["top left"])


def test_a_sample_takes_alike_from_every_domain(tmp_path):
    for domain, letter in (("english", "a"), ("russian", "я")):
        text = "\f\n".join([letter * 1000] * 20)
        (tmp_path / f"{domain}.train.txt").write_text(text, encoding="utf-8")
    sample = list(balanced_sample(tmp_path, megabytes=0.0095))
    letters = "".join(sample)
    assert letters.count("a") == 10_000
    assert letters.count("я") == 5_000
    with pytest.raises(FileNotFoundError, match=r"no \*\.train\.txt in .*: build the corpus"):
        list(balanced_sample(tmp_path / "nothing"))
