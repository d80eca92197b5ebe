"""What `deme` never does, read off its source: unpickle, evaluate text, start a shell.

The data of a run (weights, records, tables, prompts) is only ever parsed. The few places where a
library may do more are named here with the reason, so that another one has to be argued for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deme_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "breakpoint",
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn",
    "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "importlib.reload",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "marshal.loads", "marshal.load",
    "dill.load", "dill.loads", "cloudpickle.loads", "shelve.open", "runpy.run_path",
    "shutil.unpack_archive",
}  # fmt: skip
READS_ERRORS_OF_PICKLE = {"evaluation/features.py", "evaluation/clip_score.py"}
FORBIDDEN_IMPORTS = {
    "pickle": READS_ERRORS_OF_PICKLE, "marshal": set(), "shelve": set(), "dill": set(),
    "cloudpickle": set(), "joblib": set(), "yaml": set(), "pty": set(), "runpy": set(),
}  # fmt: skip
# A process is only ever another deme: a list of words, no shell.
STARTS_PROCESSES = {"jobs.py"}
# Files of code by their nature, which the user names: examples/security.md says what they run.
LOADS_TORCHSCRIPT = {"evaluation/features.py"}


Finding = tuple[str, str]


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; False where there is none, None for what is computed."""
    for one in call.keywords:
        if one.arg == name:
            return one.value.value if isinstance(one.value, ast.Constant) else None
    return False


def forbidden_in_call(place: str, call: ast.Call) -> Iterator[str]:
    """What a call does that no file of `deme` may do."""
    name = ast.unparse(call.func) if isinstance(call.func, (ast.Name, ast.Attribute)) else ""
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    for flag in ("shell", "trust_remote_code", "allow_pickle"):
        if keyword(call, flag) is not False:
            yield f"{flag} is not False"
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name.endswith((".extractall", ".extract")):
        yield "unpacks an archive"
    if name == "torch.jit.load" and place not in LOADS_TORCHSCRIPT:
        yield "loads a TorchScript"
    if name.startswith("subprocess.") and place not in STARTS_PROCESSES:
        yield "starts a process"


def forbidden_imports(place: str, node: ast.AST) -> Iterator[str]:
    """What an import brings that no file of `deme`, or only others, may use."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    for module in modules:
        if place not in FORBIDDEN_IMPORTS.get(module.split(".")[0], {place}):
            yield f"imports {module}"


def findings(source: str, place: str) -> list[Finding]:
    """Everything in a file that is not allowed there, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        said = [*forbidden_imports(place, node)]
        if isinstance(node, ast.Call):
            said += forbidden_in_call(place, node)
        found += [(f"{place}:{node.lineno}", what) for what in said]
    return found


def test_nothing_is_evaluated_unpickled_unpacked_or_given_to_a_shell() -> None:
    assert [one for path in FILES for one in findings(path.read_text(), where(path))] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec(text)", "import pickle", "from pickle import loads", "os.system('ls')",
        "subprocess.run('ls')", "f(shell=True)", "f(shell=flag)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(p, allow_pickle=True)",
        "tar.extractall(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "torch.jit.load(p)", "__import__('x')",
    ],
)  # fmt: skip
def test_it_would_be_found(source: str) -> None:
    assert len(findings(source, "data/images.py")) == 1
