"""What the README shows is what the code prints."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_print_what_the_readme_says():
    code, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    # The last line is sampled: another processor's rounding may draw another word there.
    assert printed.getvalue().splitlines()[:7] == shown.splitlines()[:7]
    assert len(printed.getvalue().splitlines()) >= 8


def test_every_picture_and_file_that_readme_and_docs_link_to_exists():
    root = Path(__file__).parents[1]
    links = {
        page.parent / link
        for page in (root / "README.md", *root.glob("docs/*.md"))
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    }
    assert len(links) >= 3
    assert [link for link in links if not link.exists()] == []


def test_the_words_for_a_picture_say_what_is_seen():
    named = re.findall(r"!\[([^]]*)\]", README)
    assert len(named) == 11
    assert [words for words in named if len(words.split()) < 8] == []
