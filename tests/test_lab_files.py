"""Labs that are kept: round trips, damage in words, and no torch where none is needed."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.routing import routing_of
from llama4_lab.train import scenes
from llama4_widgets.app import LabApp
from llama4_widgets.board import flat, unflat
from llama4_widgets.keeping import model_facts
from llama4_widgets.recording import Recording, open_lab
from llama4_widgets.still import picked, unpack

TEXT = "def add(a, b):\n    return a + b"
EDITS = (E.SkipLayer(1),)


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture(scope="module")
def app(model):
    app = LabApp(model, TEXT, shown=["router", "ablate"])
    app.edits = EDITS
    app.selection.token = 3
    return app


@pytest.fixture(scope="module")
def file(app, tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "run.lab"
    app.save(path)
    return path


def test_everything_that_was_shown_is_there_again(app, file):
    opened = LabApp.open(file)
    assert list(opened.boards) == ["router", "ablate"]
    for name, board in opened.boards.items():
        before, after = app.views[name].board.content.message(), board.content.message()
        kept = {"token": 3} if name == "ablate" else {}  # the router has all tokens
        assert flat(after) == flat(before | {"kept": kept})
        assert board.summary == f"When this was kept: {app.views[name].board.summary}"
    about = opened.recording.about
    assert about["prompt"] == TEXT and about["tokens"] == app.moment.tokens
    assert about["ids"] == app.moment.prompt.input_ids[0].tolist()
    assert tuple(E.loads(about["edits"])) == EDITS
    assert l4.Llama4Config.from_dict(about["config"]) == app.model.config
    assert about["versions"]["torch"] and about["date"].endswith("UTC")
    routing = app.moment.edited(routing_of)
    assert opened.recording.routing.keys() == vars(routing).keys() - {"tokens"}
    for name, values in opened.recording.routing.items():
        assert np.array_equal(values, getattr(routing, name)), name


def test_a_long_text_is_kept_with_a_bar(model, tmp_path, capsys):
    app = LabApp(model, TEXT, shown=["router"])
    app.save(tmp_path / "short.lab")
    assert capsys.readouterr().err == ""
    app.run(TEXT * 60)
    app.save(tmp_path / "long.lab")
    assert "keep:   0%" in capsys.readouterr().err  # before the first view


@pytest.mark.parametrize("has_room", [True, False])
def test_what_is_kept_has_all_of_a_text_where_there_is_room(model, monkeypatch, has_room):
    monkeypatch.setattr("llama4_widgets.views.router._WHOLE", 0)
    monkeypatch.setattr("llama4_widgets.views.router._PART", 1500)
    monkeypatch.setattr("llama4_widgets.views.lens._CELLS", 90)
    if not has_room:
        monkeypatch.setattr("llama4_widgets.view._KEPT", 1000)
    app = LabApp(model, 6 * TEXT, shown=["router", "lens", "attention", "ablate"])
    app.edits = EDITS
    app.selection.token = 30
    on_screen = app.views["router"].board.content
    count, part = len(app.moment.tokens), on_screen.axes["token"].size
    assert part < count > app.views["lens"].board.content.axes["near"].size
    kept = {name: state["content"] for name, state in app.recording().states.items()}
    assert app.views["router"].board.content is on_screen
    axes = {name: content["axes"] for name, content in kept.items()}
    assert (axes["router"]["token"]["size"] == axes["lens"]["near"]["size"] == count) == has_room
    router = {"token": 30} if not has_room else {}  # all of its tokens can be chosen
    token, layer = {"token": 30}, {"layer": app.selection.layer}
    told = {"router": router, "lens": token | layer, "attention": layer, "ablate": token}
    assert {name: content["kept"] for name, content in kept.items()} == told
    if has_room:
        chosen = unpack(kept["router"]["arrays"]["chosen"])
        np.testing.assert_array_equal(chosen, app.moment.edited(routing_of).expert[..., 0])


def test_a_kept_lab_keeps_its_selection_and_moves_it(app, file):
    kept = open_lab(file)
    assert kept.selection.token == 3
    for name in ("token", "layer", "expert"):
        assert kept.selection.bounds[name] == app.moment.bounds[name], name
    board = kept.boards["router"]
    panel = next(each for each in board.content.panels if each["name"] == "probability")
    before = picked(board.content, panel, kept.selection.shared)
    chosen = {**board.selection, "token": 5, "seq": board.selection["seq"] + 1}
    board.set_state({"selection": chosen})  # what a browser sends
    assert kept.selection.token == 5 and kept.boards["ablate"].selection["token"] == 5
    assert not np.array_equal(picked(board.content, panel, kept.selection.shared), before)
    assert kept.figure("router").data


def test_a_folder_that_is_not_there_is_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none for run\.lab: make it"):
        LabApp.open(file).recording.write(tmp_path / "none" / "run.lab")


def test_pictures_and_boxes_are_kept(tmp_path):
    model = l4.load("mini")
    example = scenes.sample(np.random.default_rng(0), "colour")
    app = LabApp(model, "one", shown=["router"])
    box = (1, 2, 20, 21, "red circle")
    app.run(example.question, example.images, [box])
    app.save(tmp_path / "a.lab")
    recording = Recording.read(tmp_path / "a.lab")
    assert np.array_equal(np.asarray(recording.pictures[0]), example.images[0])
    assert recording.about["boxes"] == [list(box)]
    assert "with 1 picture: " in recording.told()[0]


def test_opening_needs_no_torch(file, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None  # importing it raises ImportError\n"
        "from llama4_widgets.recording import open_lab\n"
        "lab = open_lab(sys.argv[1]); lab.to_html(sys.argv[2]); print(*lab.boards)"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "page.html")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "router ablate\n", result.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_page_says_what_it_is_and_holds_the_same(app, file, tmp_path):
    app.to_html(tmp_path / "a.html")
    open_lab(file).to_html(tmp_path / "b.html")
    first, second = ((tmp_path / name).read_text() for name in ("a.html", "b.html"))
    start = first.index("<body>"), second.index("<body>")
    states = [text.split('id="states">')[1].split("<")[0] for text in (first, second)]
    assert len(states[0]) > 1000 and states[0] == states[1]
    assert first[start[0] :].split("Written on")[0] == second[start[1] :].split("Written on")[0]
    for said in (
        "def add(a, b):",
        "SkipLayer",
        "Model: nano (float32); sha256",
        "torch ",
        "kernel",
    ):
        assert said in first
    urls = re.findall(r"https?://[^\s\"']+", first)
    assert set(urls) <= {"http://www.w3.org/2000/svg"}  # a name, which is not fetched


def test_a_view_that_failed_shows_only_why(app):
    board = app.views["router"].board
    board.problem = "this model has no experts"
    state = board.state()
    board.problem = ""
    assert (
        state["problem"] == "When this was kept: this model has no experts"
        and not state["content"]["panels"]
    )


def test_equal_arrays_are_written_once_and_places_are_checked():
    text, data = flat({"a": b"12", "b": [b"34", b"12"]})
    assert data == b"1234" and unflat(text, data) == {"a": b"12", "b": [b"34", b"12"]}
    with pytest.raises(ValueError, match="arrays are missing"):
        unflat(text, data[:3])
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        flat({"a": np.float32(1)})


def test_files_that_cannot_be_shown_are_explained(file, tmp_path):
    whole = file.read_bytes()
    for data in (b"", b"PK", whole[:-100], whole[: len(whole) // 2], b"no zip at all" * 20):
        (tmp_path / "bad.lab").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"bad.lab is no file of LabApp.save, or it is damaged"
        ):
            open_lab(tmp_path / "bad.lab")
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    (tmp_path / "bad.lab").write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        open_lab(tmp_path / "bad.lab")
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as foreign:
        foreign.writestr("letter.txt", "hello")
    with pytest.raises(ValueError, match=r"There is no item named 'lab\.json'"):
        open_lab(tmp_path / "foreign.zip")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.lab"):
        open_lab(tmp_path / "none.lab")


def test_a_file_of_a_newer_version_is_not_guessed_at(file, tmp_path):
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "new.lab", "w") as new:
        content = json.loads(old.read("lab.json"))
        content["format"] = 2
        new.writestr("lab.json", json.dumps(content))
        new.writestr("arrays.bin", old.read("arrays.bin"))
    with pytest.raises(ValueError, match=r"has format 2, and this llama4_lab reads 1"):
        open_lab(tmp_path / "new.lab")


def test_a_file_is_written_whole_or_not_at_all(file, tmp_path):
    recording = Recording.read(file)
    path = tmp_path / "run.lab"
    path.write_bytes(b"before")
    broken = Recording(recording.about, recording.states, {"odd": np.array([object()])})
    with pytest.raises(ValueError, match="allow_pickle"):
        broken.write(path)
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]


def test_the_hash_tells_models_apart_and_says_what_it_read(model, monkeypatch):
    facts = model_facts(model)
    assert facts == model_facts(l4.load("nano"))
    assert facts["name"] == "nano (float32)" and facts["of"].startswith("all ")
    other = l4.load("nano")
    other.norm.weight.data[-1] += 1
    assert model_facts(other)["sha256"] != facts["sha256"]
    monkeypatch.setattr("llama4_widgets.keeping._HASHED", 1000)
    assert model_facts(model)["of"].startswith("every ")


@pytest.mark.parametrize("kept", ["recording", "view"])
def test_a_page_is_written_whole_or_not_at_all(app, file, kept, tmp_path, monkeypatch):
    def fail(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no room")

    shown = open_lab(file) if kept == "recording" else app.views["router"]
    page = tmp_path / "page.html"
    page.write_text("before")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none for a\.html: make it"):
        shown.to_html(tmp_path / "none" / "a.html")
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no room"):
        shown.to_html(page)
    assert page.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == [page.name]
