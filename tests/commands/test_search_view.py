from __future__ import annotations

import io
import math
from collections.abc import Iterator

import pytest
from rich.console import Console

from deme_cli import console
from deme_cli.api.search_view import SearchView
from deme_cli.merging.search.trials import Trial


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    console.set_quiet(False)
    yield
    console.set_quiet(False)


def screen(width: int = 80, height: int = 24) -> Console:
    return Console(
        file=Terminal(), force_terminal=True, width=width, height=height, highlight=False,
        markup=False, soft_wrap=True, color_system=None, legacy_windows=False,
    )  # fmt: skip


def trials(dimensions: int, count: int = 20, rungs: int = 1) -> list[Trial]:
    made, best = [], [math.inf] * rungs
    for index in range(count):
        rung = index * rungs // count
        value = math.inf if index == 3 else 1.0 + 1 / (1 + index)
        best[rung] = min(best[rung], value)
        point = tuple(0.1 * ((index + i) % 9) - 0.3 for i in range(dimensions))
        name = {0: "base", 1: "1/N each"}.get(index, "")
        made.append(Trial(index, point, value, best[rung], rung, 1.25, name))
    return made


def shown(view: SearchView, terminal: Console) -> list[str]:
    """The lines of one picture of the view."""
    with terminal.capture() as capture:
        terminal.print(view)
    return capture.get().splitlines()


def labels_of(count: int) -> list[str]:
    return [f"{i + 1}of{count}" for i in range(count)]


def test_without_a_terminal_each_trial_is_a_line(capsys) -> None:
    with SearchView(["1of2", "2of2"], ["loss"], 3) as view:
        view.add(Trial(0, (0.0, 0.0), 0.09312, 0.09312, 0, 1.2, "base"))
        view.add(Trial(1, (0.2, 0.1), 0.09301, 0.09301, 0, 1.25))
        view.progress(10, 5000)
        view.add(Trial(2, (0.4, 0.5), math.inf, 0.09301, 0, 0.5))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "trial 1/3 (base) loss 0.09312 best 0.09312 at 0 0 (1.2 s)",
        "trial 2/3 loss 0.09301 best 0.09301 at 0.2 0.1 (1.2 s)",
        "trial 3/3 loss not finite best 0.09301 at 0.2 0.1 (0.5 s)",
    ]


def test_many_coefficients_are_summed_up_or_cut(capsys) -> None:
    def summary(point: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(point[::2]) / 300, sum(point[1::2]) / 300)

    with SearchView(["1of2", "2of2"], ["loss"], summary=summary) as view:
        view.add(Trial(0, (0.5, 0.25) * 300, 1.0, 1.0, 0, 2.0))
    with SearchView(labels_of(40), ["loss"]) as view:
        view.add(Trial(0, (0.5,) * 40, 1.0, 1.0, 0, 2.0))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "trial 1 loss 1 best 1 at mean 0.5 0.25 (2.0 s)"
    assert second == "trial 1 loss 1 best 1 at 0.5 0.5 0.5 0.5 0.5 0.5 and 34 more (2.0 s)"


def test_quiet_shows_nothing(capsys) -> None:
    console.set_quiet(True)
    terminal = screen()
    for given in (None, terminal):
        with SearchView(["1of1"], ["loss"], 2, screen=given) as view:
            view.add(Trial(0, (0.0,), 1.0, 1.0))
            view.progress(1, 2)
    assert capsys.readouterr() == ("", "")
    assert terminal.file.getvalue() == ""


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (12, 4), (200, 60)])
@pytest.mark.parametrize("dimensions", [1, 4, 8, 40])
@pytest.mark.parametrize("rungs", [1, 3])
def test_the_screen_fits_the_terminal(size: tuple[int, int], dimensions: int, rungs: int) -> None:
    width, height = size
    terminal = screen(width, height)
    view = SearchView(
        labels_of(dimensions), ["held-out loss", "kid", "fid"][:rungs], 64, name="cmaes",
        screen=terminal,
    )  # fmt: skip
    assert shown(view, terminal), "before the first trial"
    for trial in trials(dimensions, rungs=rungs):
        view.add(trial)
        view.progress(2048, 5000)
        lines = shown(view, terminal)
        assert max(map(len, lines)) <= width
        assert len(lines) <= height - 1


def test_the_screen_tells_what_is_searched_how_far_it_is_and_what_is_best() -> None:
    terminal = screen()
    objectives = ["loss", "kid"]
    view = SearchView(labels_of(4), objectives, 64, name="cmaes", screen=terminal)
    for trial in trials(4):
        view.add(trial)
    view.progress(2048, 5000)
    text = "\n".join(shown(view, terminal))
    assert "cmaes  20 of 64 trials  rung 0: loss > kid" in text
    assert "0:55 left" in text or "0:54 left" in text, "44 trials of 1.25 s"
    assert "trial 21: 2048/5000 images" in text
    assert "best loss 1.05 at trial 20" in text
    assert "47.50% below base 2, 30.00% below 1/N each 1.5" in text
    assert "█" in text


def test_a_live_screen_ends_compact() -> None:
    terminal = screen()
    with SearchView(labels_of(2), ["loss"], 20, screen=terminal) as view:
        for trial in trials(2):
            view.add(trial)
    final = shown(view, terminal)
    assert len(final) <= 8
    assert "20 of 20 trials" in final[0]
    assert "left" not in final[0]


def test_a_search_in_which_all_is_broken_is_shown() -> None:
    terminal = screen()
    view = SearchView(labels_of(2), ["loss"], screen=terminal)
    view.add(Trial(0, (0.0, 0.0), math.inf, math.inf))
    text = "\n".join(shown(view, terminal))
    assert "no finite objective so far" in text
    assert "not finite" in text


def test_a_terminal_without_block_characters_gets_plain_ones(monkeypatch) -> None:
    terminal = screen()
    monkeypatch.setattr(type(terminal), "encoding", property(lambda _: "ascii"))
    view = SearchView(labels_of(3), ["held-out loss"], 64, screen=terminal)
    for trial in trials(3):
        view.add(trial)
    assert all(line.isascii() for line in shown(view, terminal))


def test_trials_of_an_earlier_run_or_of_others_count_without_a_line(capsys) -> None:
    earlier = [
        Trial(0, (0.0, 0.0), 0.2, 0.2, 0, 1.0, "base"),
        Trial(1, (0.2, 0.1), 0.1, 0.1, 0, 1.0),
    ]
    with SearchView(["1of2", "2of2"], ["loss"], 3) as view:
        view.recall(earlier)
        view.add(Trial(2, (0.4, 0.5), 0.3, 0.1, 0, 0.5))
    assert capsys.readouterr().err.splitlines() == [
        "trial 3/3 loss 0.3 best 0.1 at 0.2 0.1 (0.5 s)"
    ]
