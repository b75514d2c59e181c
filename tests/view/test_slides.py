"""Test that open slides and cached pictures stay within their limits, and that no slide in use is closed."""

import contextlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cfusion.errors import DataError
from cfusion.view.picture_cache import PictureCache
from cfusion.view.served_slides import OpenSlides, SlideFolder, SlideGoneError


class Opened:
    """A stand-in for a slide that records whether it is open."""

    def __init__(self, path: Path) -> None:
        if path.name == "broken":
            raise DataError("broken")
        self.path, self.open = path, True

    def close(self) -> None:
        assert self.open, "closed twice"
        self.open = False


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}" for i in range(6)]
    for path in paths:
        path.touch()
    return paths


@settings(deadline=None, max_examples=60)
@given(order=st.lists(st.integers(0, 5), max_size=60))
def test_few_stay_open_and_the_last_used_are_kept(order: list[int], tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "held"
    folder.mkdir(exist_ok=True)
    for i in range(6):
        (folder / str(i)).touch()
    made: list[Opened] = []
    held = OpenSlides(lambda path: made.append(Opened(path)) or made[-1], 3)
    for i in order:
        with held.lease(folder / str(i)) as slide:
            assert slide.open
            assert slide.path.name == str(i)
        assert sum(s.open for s in made) == len(held) <= 3
    last = list(dict.fromkeys(reversed(order)))[:3]
    assert {int(s.path.name) for s in made if s.open} == set(last)
    held.close()
    assert not any(s.open for s in made)


def test_a_slide_in_use_stays_open_beyond_the_limit(paths: list[Path]):
    held = OpenSlides(Opened, 2)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(held.lease(paths[0]))
        for path in paths[1:]:
            with held.lease(path):
                pass
        assert first.open
        held.close()
        assert first.open
    assert not first.open


def test_a_changed_file_is_opened_again(paths: list[Path]):
    held = OpenSlides(Opened, 2)
    with held.lease(paths[0]) as before:
        os.utime(paths[0], ns=(1, 1))
        with held.lease(paths[0]) as after:
            assert after is not before
            assert before.open
    assert not before.open
    paths[0].unlink()
    with pytest.raises(SlideGoneError), held.lease(paths[0]):
        pass
    assert not after.open


def test_a_failed_opening_can_be_retried(paths: list[Path]):
    broken = paths[0].with_name("broken")
    broken.touch()
    held = OpenSlides(Opened, 2)
    for _ in range(3):
        with pytest.raises(DataError, match="broken"), held.lease(broken):
            pass
    held.close()


def test_concurrent_readers_open_a_slide_once(paths: list[Path]):
    made = []

    def slowly(path: Path) -> Opened:
        threading.Event().wait(0.05)
        made.append(Opened(path))
        return made[-1]

    held, barrier = OpenSlides(slowly, 2), threading.Barrier(16)

    def ask() -> None:
        barrier.wait()
        with held.lease(paths[0]) as slide:
            assert slide.open

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


@settings(deadline=None, max_examples=60)
@given(sides=st.lists(st.integers(1, 64), max_size=40), limit=st.integers(0, 6000))
def test_pictures_stay_within_their_memory(sides: list[int], limit: int):
    cache = PictureCache(limit)
    for side in sides:
        again = cache.jpeg((side,), lambda side=side: Image.new("RGB", (side, side)))
        assert again[:2] == b"\xff\xd8"
        assert cache.held_bytes == sum(map(len, cache._pictures.values())) <= limit


def test_a_picture_is_drawn_once():
    cache, drawn = PictureCache(1 << 20), []
    for _ in range(3):
        cache.jpeg(("a",), lambda: drawn.append(1) or Image.new("RGB", (8, 8)))
    assert len(drawn) == 1


def test_one_slide_that_cannot_be_opened_is_refused_at_once(tmp_path: Path):
    path = tmp_path / "notes.csv"
    path.write_text("no,slide\n")
    with pytest.raises(DataError, match=r"notes\.csv"):
        SlideFolder(path)
