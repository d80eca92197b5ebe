"""The key under which what was drawn of a candidate is kept."""

from __future__ import annotations

from pathlib import Path

from deme_cli.merging.candidates import Evaluator
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.methods import LINEAR, MethodSettings
from deme_cli.merging.space import Space


class KeyOf:
    """An objective that tells nothing but under which key it would keep a candidate's images."""

    def __call__(self, experts: object, check: object, key: str = "") -> float:
        self.key = key
        return 0.0


def key_of(run_folder: Path, experts: tuple[int, int], method: MethodSettings = LINEAR) -> str:
    paths = [run_folder / f"ft_{index}of4.safetensors" for index in experts]
    inputs = open_inputs(run_folder / "base.safetensors", open_experts(paths, "expert"))
    space = Space(("a", "b"), ((-1.0, 2.0),) * 2, (0.5, 0.5))
    evaluator = Evaluator(inputs, space, method=method, device="cpu", dtype="fp32")
    objective = KeyOf()
    evaluator.objectives = [objective]
    evaluator(0, (0.5, 0.25))
    return objective.key


def test_images_kept_of_a_candidate_are_not_taken_for_those_of_other_experts_or_methods(
    run_folder: Path,
) -> None:
    key = key_of(run_folder, (1, 2))
    assert key == key_of(run_folder, (1, 2))
    others = {key_of(run_folder, (1, 3)), key_of(run_folder, (1, 2), MethodSettings("dare"))}
    assert len({key, *others}) == 3
