"""Imports that wait until they are needed: torch brings a compiler, diffusers all its networks.

A U-Net of pixels uses a few percent of what `import diffusers` runs. The packages named here run
when a name is asked of them that they do not have yet; the results are those of the plain import,
and a package that is not there under its name is imported (or missing) as ever. `torch._dynamo`
has answers ready for what torch and diffusers ask of it in a process that compiles nothing, peft
for what diffusers, accelerate and transformers ask of it in one that has no adapter.

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
WHOLE = {"scipy.integrate", "scipy.stats", "torch._dynamo"}
# Of peft, what is asked of it where no network has an adapter.
ADAPTERS: dict[str, tuple[str, ...]] = {
    "peft": ("PeftMixedModel", "PeftModel", "set_peft_model_state_dict"),
    "peft.helpers": ("disable_input_dtype_casting",),
    "peft.tuners": (),
    "peft.tuners.tuners_utils": ("BaseTunerLayer",),
}


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
        return getattr(sys.modules[self.__name__], name)


def _run(module: ModuleType) -> None:
    """Make of a package that waits the package itself, in place: peft whole, in its own order."""
    if module.__name__ in ADAPTERS:
        module = sys.modules["peft"]
        if not isinstance(module, _Waiting):
            return
        for name in ADAPTERS.keys() - {"peft"}:
            sys.modules.pop(name, None)
            module.__dict__.pop(name.removeprefix("peft."), None)
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


class _Later(type):
    """The type of a class of peft before peft is there: nothing is an instance of such a class."""

    def __instancecheck__(cls, value: Any) -> bool:
        is_waiting = isinstance(sys.modules["peft"], _Waiting)
        return not is_waiting and isinstance(value, _real(cls.__module__, cls.__name__))


def _real(place: str, name: str) -> Any:
    """What peft has under a name; runs peft."""
    _run(sys.modules[place])
    return getattr(sys.modules[place], name)


def _later(place: str, name: str) -> Any:
    """A class or a function of peft, for those who ask for it and may never use it."""
    if name[0].isupper():
        return _Later(name, (), {"__module__": place})
    return lambda *args, **kwargs: _real(place, name)(*args, **kwargs)


class _Finder:
    """Finds the packages that wait; has the rest found as ever."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        is_answered = name in ADAPTERS
        is_in_waiting = isinstance(sys.modules.get(package), _Waiting)
        if is_in_waiting and not is_answered and package in WHOLE | ADAPTERS.keys():
            _run(sys.modules[package])
            if name in sys.modules:  # came with it; importlib asks its own spec, and runs that
                spec = sys.modules[name].__spec__
                assert spec
                spec.loader = _Loader(sys.modules[name], spec.loader)
                return spec
        waits = is_in_waiting or name == "peft" if is_answered else name in HAND_ON_NAMES | WHOLE
        if not waits or target is not None:  # told: to be loaded again
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            module = _Waiting(name)
            module.__dict__["_loader"] = spec.loader
            asked: list = []
            answers = {asked_for: _later(name, asked_for) for asked_for in ADAPTERS.get(name, ())}
            if name == "torch._dynamo":
                answers, module.__dict__["_asked"] = _answers(asked), asked
            module.__dict__.update(answers, _answers=tuple(answers))
            spec.loader = _Loader(module)
        return spec


class _Loader(Loader):
    """Gives a module that is there already; nothing runs.   own: the loader that it then has."""

    def __init__(self, module: ModuleType, own: Any = None) -> None:
        self.module, self.own = module, own

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        if self.own is not None:
            assert module.__spec__
            module.__spec__.loader = self.own
