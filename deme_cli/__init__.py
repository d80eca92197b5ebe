"""deme in Python: what the command line does, as functions that return what they made.

    import deme_cli as deme
    from deme_cli.config import EvalConfig, FinetuneConfig, MergeConfig, SampleConfig

    run = deme.split("digits").run                       # base.safetensors, deme.toml
    experts = deme.finetune("all", run.settings(FinetuneConfig, p=0.1), run=run)
    vectors = deme.task_vector(experts)                  # their norms, and the cosines between them
    merged = deme.merge(experts, MergeConfig(coefficients=[0.1, 0.1, 0.2, 0.5]))
    found = deme.merge(experts, run.settings(MergeConfig, search="grid"), run=run, force=True)
    images = deme.sample(found.path, run.settings(SampleConfig, num=64))
    table = deme.evaluate([run.base, found.path], run.settings(EvalConfig, fid="digits", num=2000))
    losses = deme.analyze_losses([run.base, *experts], run=run)    # losses.reading, .document

Settings are the tables of deme.toml (`deme_cli.config`): `run.settings(FinetuneConfig, p=0.1)` is
the file's table with another p, `FinetuneConfig(p=0.1)` the defaults with it. Artifacts are paths;
failures that a user can mend are `DemeError`s (`deme_cli.errors`). Notes and warnings go to stderr;
`set_quiet(True)` silences them, and `progress` is told how far a verb is. Each name is imported
when it is first used.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deme_cli.analysis.activations import analyze_activations as analyze_activations
    from deme_cli.analysis.forecast import analyze_forecast as analyze_forecast
    from deme_cli.analysis.gradients import analyze_gradients as analyze_gradients
    from deme_cli.analysis.landscape import analyze_landscape as analyze_landscape
    from deme_cli.analysis.losses import analyze_losses as analyze_losses
    from deme_cli.analysis.result import Analysis as Analysis
    from deme_cli.analysis.task_vectors import analyze_task_vectors as analyze_task_vectors
    from deme_cli.comparison.compare import Compared as Compared
    from deme_cli.comparison.compare import compare as compare
    from deme_cli.console import set_quiet as set_quiet
    from deme_cli.diffusion.export import ExportCheck as ExportCheck
    from deme_cli.diffusion.export import export as export
    from deme_cli.diffusion.foreign import import_expert as import_expert
    from deme_cli.evaluation.evaluate import Evaluation as Evaluation
    from deme_cli.evaluation.evaluate import evaluate as evaluate
    from deme_cli.evaluation.inventory import Inventory as Inventory
    from deme_cli.evaluation.inventory import take_inventory as take_inventory
    from deme_cli.evaluation.measure import Figure as Figure
    from deme_cli.evaluation.references import reference_statistics as reference_statistics
    from deme_cli.html_report import WrittenReport as WrittenReport
    from deme_cli.html_report import report as report
    from deme_cli.inspection import Inspected as Inspected
    from deme_cli.inspection import inspect as inspect
    from deme_cli.merging.low_rank import export_lora as export_lora
    from deme_cli.merging.merge import MergeResult as MergeResult
    from deme_cli.merging.merge import merge as merge
    from deme_cli.merging.merge import replay as replay
    from deme_cli.merging.show_search import ShownSearch as ShownSearch
    from deme_cli.merging.show_search import show_search as show_search
    from deme_cli.merging.task_vectors import TaskVectors as TaskVectors
    from deme_cli.merging.task_vectors import task_vector as task_vector
    from deme_cli.run_file import RunFile as RunFile
    from deme_cli.run_file import read_run_file as read_run_file
    from deme_cli.sampling.sample import Images as Images
    from deme_cli.sampling.sample import ensemble_sample as ensemble_sample
    from deme_cli.sampling.sample import sample as sample
    from deme_cli.training.finetune import finetune as finetune
    from deme_cli.training.split import SplitResult as SplitResult
    from deme_cli.training.split import split as split

__version__ = "0.1.0"

# Where each name lies, as the imports above say it to type checkers.
_PLACES = {
    item.name: str(node.module)
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("deme_cli.")
    for item in node.names
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'deme_cli' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
