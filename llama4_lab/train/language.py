"""Tell prose of one language from the untranslated text and the debris around it.

"Translated" manuals fall back to English wherever a sentence has no translation, up to nearly the
whole text of some packages, so every paragraph is judged by itself.
"""

import re
import unicodedata

_WORDS = {
    "english": "the of and to is that it for was with as be by this are from or which have not "
    "you your can will they when if an at has been may should must these there into all",
    "german": "der die das und ist nicht ein eine einen einem einer zu den dem des mit für auf von "
    "im sich werden wird oder wenn sie kann als auch aus bei nach wie diese dieser dieses sind es",
    "french": "le la les et est un une du des de que qui dans pour ce cette pas sur par au aux "
    "avec vous il en ou si sont être plus ne se sa son ces peut votre à l d n c s qu",
    "spanish": "el la los las y es un una de del que en para por con no se su al como este esta "
    "lo si más o puede son sus ser cuando le pero está ha",
}
FUNCTION_WORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
SCRIPTS = {
    "russian": re.compile(r"[Ѐ-ӿ]"),
    "chinese": re.compile(r"[㐀-䶿一-鿿]"),
}
LANGUAGES = ("german", "french", "spanish", "russian", "chinese")

_WORD = re.compile(r"[^\W\d_]+")
_BOILERPLATE = re.compile(
    r"\S@\S|https?:|www\.|©|copyright|general public licen|free documentation licen|"
    r"creative commons|savannah|all rights reserved|übersetzung dieser handbuchseite|"
    r"traduction (française )?de cette page|traducción (al español )?de esta página|"
    r"(русский )?перевод (этой )?страницы|中文手册页翻译|本页面中文版|^\W*table of contents",
    re.IGNORECASE,
)
_DEBRIS = re.compile(r"\\f|\\\(|\{\{|\}\}|&[a-z]+;|</?[a-z]+>|�|\$\{|\|\s*\||\s[,.](\s|$)")


def tidy(text: str) -> str:
    """Compose accents, drop invisible characters and make all white space one plain space.

    >>> tidy("a\\u00a0b \\u200b c\\u00ad")
    'a b c'
    """
    text = re.sub(r"[\u00ad\u200b-\u200f\u2060\ufeff¶]", "", unicodedata.normalize("NFC", text))
    return " ".join(text.split())


def is_prose(paragraph: str, language: str) -> bool:
    """Say whether a paragraph is a sentence or more of running text in this language.

    Languages with a script of their own need three quarters of the letters in it; those in Latin
    script need a share of function words of their own above that of English ones. Paragraphs with
    few letters (tables, options), addresses, licence notes or left-over markup are refused.

    >>> is_prose("Die Datei wird nicht gelöscht, solange sie noch ein Prozess benutzt.", "german")
    True
    >>> is_prose("The file is deleted as soon as no process uses it any longer.", "german")
    False
    """
    if language not in LANGUAGES:
        raise ValueError(f"no filter for {language!r}: choose one of {', '.join(LANGUAGES)}")
    dense = language == "chinese"
    if len(paragraph) < (20 if dense else 60):
        return False
    if _BOILERPLATE.search(paragraph) or _DEBRIS.search(paragraph):
        return False
    letters = sum(map(str.isalpha, paragraph))
    if letters < (0.6 if dense else 0.7) * len(paragraph.replace(" ", "")):
        return False
    if language in SCRIPTS:
        return len(SCRIPTS[language].findall(paragraph)) >= 0.75 * letters
    words = [word.lower() for word in _WORD.findall(paragraph)]
    own = sum(word in FUNCTION_WORDS[language] for word in words)
    english = sum(word in FUNCTION_WORDS["english"] for word in words)
    return own >= 0.15 * len(words) and own > 2 * english
