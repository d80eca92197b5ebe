"""Analyses of the digits in the run's folder, stopped on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.analysis.result import Analysis
from deme_cli.console import Step
from deme_cli.errors import Stopped


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
        first = next(step for step in steps if step.label)
        assert first.done >= done
        assert first.note.startswith("continuing")
        assert steps[-1].done <= steps[-1].total
        return made

    return resume
