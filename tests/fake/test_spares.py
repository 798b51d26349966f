"""Room that calls into C share out among threads, and give back."""

from __future__ import annotations

from uffdaemon.native import take_spare


class TakenMeanwhile(list[str]):
    """A list that another thread empties between a look and the next step."""

    def __bool__(self) -> bool:
        return True


def test_a_spare_is_taken_once_and_made_where_there_is_none() -> None:
    spares = ["spare"]
    assert take_spare(spares, lambda: "new") == "spare"
    assert take_spare(spares, lambda: "new") == "new"


def test_one_that_another_thread_has_just_taken_is_made() -> None:
    assert take_spare(TakenMeanwhile(), lambda: "new") == "new"
