"""Imports that wait until they are needed: torch brings a compiler, diffusers all its networks.

A U-Net of pixels uses a few percent of what `import diffusers` runs. The packages named here run
when a name is asked of them that they do not have yet; the results are those of the plain import,
and a package that is not there under its name is imported (or missing) as ever. `torch._dynamo`
has answers ready for what torch and diffusers ask of it in a process that compiles nothing.

The executable asks for this before anything imports torch; `import deme_cli` changes no import.
"""

from __future__ import annotations

import sys
from functools import wraps
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

# Their files can be imported one by one, in any order; they themselves only hand on names.
HAND_ON_NAMES = {
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.models.transformers",
    "diffusers.models.unets",
}
# Their files need the package whole.
WHOLE = {"scipy.stats", "torch._dynamo"}


def defer_imports() -> None:
    """Let these packages wait, in a process that has not loaded torch."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Waiting(ModuleType):
    """A package whose `__init__` has not run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _run(self)
        return getattr(self, name)


def _run(module: ModuleType) -> None:
    """Make of a package that waits the package itself, in place."""
    loader = module.__dict__.pop("_loader")
    asked = module.__dict__.pop("_asked", [])
    for answer in module.__dict__.pop("_answers", ()):
        delattr(module, answer)
    module.__class__ = ModuleType
    assert module.__spec__
    module.__spec__.loader = module.__loader__ = loader
    loader.exec_module(module)
    for function in asked:
        module.allow_in_graph(function)


def _answers(asked: list) -> dict[str, Any]:
    """What `torch._dynamo` answers where nothing is compiled, and keeps to once something is."""

    def allow_in_graph(function: Any) -> Any:
        asked.append(function)
        return function

    def disable(function: Any = None, *how: Any, **options: Any) -> Any:
        if function is None:
            return lambda function: disable(function, *how, **options)

        @wraps(function)
        def disabled(*args: Any, **kwargs: Any) -> Any:
            dynamo = sys.modules["torch._dynamo"]
            is_waiting = isinstance(dynamo, _Waiting)
            run = function if is_waiting else dynamo.disable(function, *how, **options)
            return run(*args, **kwargs)

        return disabled

    return {
        "allow_in_graph": allow_in_graph,
        "disable": disable,
        "graph_break": lambda *args, **kwargs: None,
        "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),
    }


class _Finder:
    """Finds the packages that wait, once each; has the rest found as ever."""

    def __init__(self) -> None:
        self.to_wait = HAND_ON_NAMES | WHOLE

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        if package in WHOLE and isinstance(sys.modules.get(package), _Waiting):
            _run(sys.modules[package])
            if name in sys.modules:  # came with it
                return ModuleSpec(name, _Loader(sys.modules[name]))
        if name not in self.to_wait:
            return None
        self.to_wait.discard(name)
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            module = _Waiting(name)
            module.__dict__["_loader"] = spec.loader
            if name == "torch._dynamo":
                asked: list = []
                answers = _answers(asked)
                module.__dict__.update(answers, _asked=asked, _answers=tuple(answers))
            spec.loader = _Loader(module)
        return spec


class _Loader(Loader):
    """Gives a module that is there already; nothing runs."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass
