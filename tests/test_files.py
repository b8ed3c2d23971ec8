import signal
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.files import (
    DELETED,
    NEW,
    REPLACED,
    appearing,
    behind_links,
    beside,
    clean,
    delete,
    put_in_place,
    remove,
    standing,
    workplace,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    """Two models, and what somebody keeps beside them under the names that programs like to take."""
    for name in ("model", "new", "model.old", "model.tmp", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    return tmp_path


def test_a_file_appears_whole_and_keeps_what_stood_there_until_then(tmp_path):
    path = tmp_path / "config.yml"
    write_text(path, "ä\n")
    with pytest.raises(ZeroDivisionError), appearing(path) as file:
        file.write(b"half")
        assert path.read_text(encoding="utf-8") == "ä\n"
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert names(tmp_path) == ["config.yml"]


def test_a_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "text"
    assert behind_links(tmp_path / "link") == (tmp_path / "disk" / "file").resolve()
    assert behind_links(tmp_path / "disk") == tmp_path / "disk"


def test_what_a_killed_writer_left_goes_with_the_next_one_and_a_live_one_keeps_its(tmp_path):
    code = (
        "import signal, sys, time; from castalia.files import appearing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "with appearing(sys.argv[1]) as file:\n    print('ready', flush=True)\n    time.sleep(99)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "f[1]")], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for writer in writers:
        writer.stdout.readline()
    writers[0].kill()
    writers[0].wait()
    write_text(tmp_path / "f[1]", "mine")
    left = [name for name in names(tmp_path) if name != "f[1]"]
    writers[1].send_signal(signal.SIGINT)
    writers[1].wait()
    for writer in writers:
        writer.stdout.close()
    assert len(left) == 1
    assert names(tmp_path) == ["f[1]"]
    assert (tmp_path / "f[1]").read_text() == "mine"


def test_a_folder_is_replaced_and_nothing_beside_it(folder):
    old = put_in_place(folder / "new", folder / "model")
    assert (folder / "model" / "weights").read_text() == "new"
    assert (old / "model" / "weights").read_text() == "model"
    remove(old)
    assert names(folder) == ["model", "model.old", "model.partial", "model.tmp"]


def test_a_replacement_that_was_cut_off_is_undone(folder):
    (folder / "model").rename(workplace(folder / "model", REPLACED) / "model")
    clean(folder)
    assert names(folder) == ["model", "model.old", "model.partial", "model.tmp", "new"]
    assert (folder / "model" / "weights").read_text() == "model"


def test_what_was_being_deleted_or_made_is_not_brought_back(folder):
    (folder / "model").rename(workplace(folder / "model", DELETED) / "model")
    (workplace(folder / "other", NEW) / "other").mkdir()
    beside(folder / "third", NEW).mkdir()  # a kill came before the mark
    clean(folder)
    assert names(folder) == ["model.old", "model.partial", "model.tmp", "new"]


def test_cleaning_one_name_leaves_the_others(folder):
    workplace(folder / "model", NEW)
    workplace(folder / "new", NEW)
    clean(folder, "model")
    assert names(folder)[0] == ".new.castalia-new"


@pytest.mark.parametrize("kind", [NEW, REPLACED, DELETED])
def test_a_folder_without_the_mark_is_somebodys(folder, kind):
    strange = beside(folder / "model", kind)
    strange.mkdir()
    (strange / "thesis").write_text("x")
    clean(folder)
    for act in (lambda: workplace(folder / "model", kind), lambda: remove(strange)):
        with pytest.raises(FileExistsError):
            act()
    assert (strange / "thesis").read_text() == "x"


def test_a_link_inside_of_a_workplace_is_removed_and_not_followed(folder):
    place = workplace(folder / "model", NEW)
    (place / "link").symlink_to(folder / "model.old")
    remove(place)
    assert (folder / "model.old" / "weights").exists()


def test_deleting_leaves_nothing(folder):
    delete(folder / "model")
    assert names(folder) == ["model.old", "model.partial", "model.tmp", "new"]


def test_folders_without_a_name_stand_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert standing(Path()) == Path()
    assert standing(Path("/")) == Path("/")
