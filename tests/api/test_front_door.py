"""Commands call the very functions that `import deme_cli` offers, and nothing beside them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deme_cli

TWO = "ft_1of4.safetensors ft_2of4.safetensors"
# A command line for each function. Where one has several ways in, one of them.
VERBS = {
    "split": "split digits -o run",
    "finetune": "finetune --range 1/4 --data digits --steps 1 --held-out 0",
    "import_expert": "import unet --range 1/4",
    "task_vector": f"task-vector {TWO}",
    "merge": f"merge {TWO} -w 0.5,0.5",
    "replay": "merge --replay ft_1of4.safetensors",
    "show_search": "merge --show ft_1of4.safetensors",
    "sample": "sample base.safetensors -n 1 --steps 1",
    "ensemble_sample": f"ensemble-sample {TWO} -n 1 --steps 1",
    "evaluate": "eval base.safetensors --fid digits -n 2 --steps 1",
    "reference_statistics": "stats digits -o x.safetensors",
    "export": "export base.safetensors out",
    "export_lora": "export ft_1of4.safetensors x.safetensors --lora 2",
    "analyze_losses": "analyze losses base.safetensors",
    "analyze_forecast": "analyze forecast",
    "analyze_gradients": "analyze gradients base.safetensors",
    "analyze_activations": "analyze activations ft_1of4.safetensors",
    "analyze_landscape": "analyze landscape base.safetensors",
    "analyze_task_vectors": "analyze task-vectors",
    "compare": "compare table1 --dry-run",
    "report": "report",
    "inspect": "inspect base.safetensors",
    "take_inventory": "doctor",
}
SETTINGS = {"set_quiet", "read_run_file"}  # of those who call verbs from Python


class Called(Exception):
    """The verb was reached."""


def test_every_function_of_the_package_has_its_command() -> None:
    functions = {name for name in deme_cli.__all__ if inspect.isfunction(getattr(deme_cli, name))}
    assert functions - SETTINGS == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_calls_the_function_of_the_package(
    verb: str, run_folder: Path, deme: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("unet.toml").write_text("[model]\nsample_size = 8\n")
    called = []

    def verb_of_the_package(*args: object, **options: object) -> None:
        called.append(verb)
        raise Called

    function = getattr(deme_cli, verb)
    for name, module in list(sys.modules.items()):  # where a command has imported it already, too
        if name.startswith("deme_cli.") and vars(module).get(verb) is function:
            monkeypatch.setattr(module, verb, verb_of_the_package)
    result = deme(*VERBS[verb].split())
    assert called == [verb], (result.exception, result.output)
