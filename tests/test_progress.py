"""A bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from io import StringIO

from django.core.management.base import OutputWrapper

from aemos.lib.progress import ProgressBar


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_every_step_and_ends_its_line() -> None:
    out = Terminal()
    with ProgressBar(OutputWrapper(out), unit="chains", draw_seconds=0) as bar:
        bar.draw(0, of=1_200)
        bar.draw(600, of=1_200)
        bar.draw(1_200, of=1_200)
    empty, half, full = "." * 30, "#" * 15 + "." * 15, "#" * 30
    assert out.getvalue() == (
        f"\r[{empty}] 0 of 1,200 chains\r[{half}] 600 of 1,200 chains\r[{full}] 1,200 of 1,200 chains\n"
    )


def test_steps_that_follow_too_soon_are_left_out_except_the_last() -> None:
    out = Terminal()
    with ProgressBar(OutputWrapper(out), draw_seconds=60) as bar:
        for done in range(1, 101):
            bar.draw(done, of=100)
    assert out.getvalue().count("\r") == 2
    assert out.getvalue().endswith("100 of 100\n")


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    out = StringIO()
    with ProgressBar(OutputWrapper(out)) as bar:
        bar.draw(1, of=1)
    assert out.getvalue() == ""
