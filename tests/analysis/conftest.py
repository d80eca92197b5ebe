"""Analyses of the digits, stopped on the way; models that are changed by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from deme_cli.analysis.result import Analysis
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.console import Step
from deme_cli.errors import Stopped


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures() -> Iterator[None]:
    with matplotlib.rc_context({"savefig.dpi": 20}):
        yield


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[..., Analysis]:
    """Stop a call once `done` units are measured, and call it again; checks what it then says."""

    def resume(call: Callable[..., Analysis], done: int) -> Analysis:
        steps: list[Step] = []
        asked = iter([signal.SIGTERM])  # once: the second one kills

        def stop(step: Step) -> None:
            if step.done >= done and (name := next(asked, None)):
                os.kill(os.getpid(), name)

        with pytest.raises(Stopped, match=r"stopped after \d+ of \d+ ") as stopped:
            call(progress=stop)
        assert stopped.value.exit_code == 75
        made = call(progress=steps.append)
        assert any(step.note.startswith("continuing after") for step in steps)
        first = next(step for step in steps if step.label)
        assert first.done >= done
        assert steps[-1].done <= steps[-1].total
        return made

    return resume


@pytest.fixture
def write_changed() -> Callable[..., Path]:
    """Write a model with all weights times `scale`, some put in or, where None, left out."""

    def write(path: str, source: str, scale: float = 1.0, **changes: Any) -> Path:
        weights = {name: scale * theta for name, theta in load_tensors(Path(source)).items()}
        kept = {n: theta for n, theta in (weights | changes).items() if theta is not None}
        write_artifact(Path(path), kept, read_record(Path(source)))
        return Path(path)

    return write
