"""What `deme` never does, read off its source: unpickle, evaluate text, start a shell.

The data of a run (weights, records, tables, prompts) is only ever parsed. The few places where a
library may do more are named here with the reason, so that another one has to be argued for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "deme_cli"
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "breakpoint",
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn",
    "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "importlib.reload",
    "shutil.unpack_archive", "gather_object", "all_gather_object", "broadcast_object_list",
}  # fmt: skip
FORBIDDEN_IMPORTS = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "pty", "runpy",
}  # fmt: skip
ALLOWED = {
    ("evaluation/features.py", "imports pickle"),  # for the errors that torch raises
    ("evaluation/clip_score.py", "imports pickle"),
    ("jobs.py", "starts a process"),  # only ever another deme: a list of words, no shell
    ("distributed.py", "starts a process"),  # likewise
    # files of code by their nature, which the user names: examples/security.md says what they run
    ("evaluation/features.py", "loads a TorchScript"),
}


def constant(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; False where there is none, None for what is computed."""
    for one in call.keywords:
        if one.arg == name:
            return one.value.value if isinstance(one.value, ast.Constant) else None
    return False


def dotted(node: ast.expr) -> str:
    """A name such as `os.path.join`; of what is no chain of names, the attributes at its end."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_in_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    for flag in ("shell", "trust_remote_code", "allow_pickle"):
        if constant(call, flag) is not False:
            yield f"{flag} is not False"
    if name == "torch.load" and constant(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name.endswith((".extractall", ".extract")):
        yield "unpacks an archive"
    if name == "torch.jit.load":
        yield "loads a TorchScript"
    if name.startswith("subprocess."):
        yield "starts a process"


def findings(source: str, place: str = "data/images.py") -> set[tuple[str, str]]:
    """Everything in a file that is not allowed there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += forbidden_in_call(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules = modules or [alias.name for alias in node.names]
            found += [f"imports {m}" for m in modules if m.split(".")[0] in FORBIDDEN_IMPORTS]
    return {(place, what) for what in found} - ALLOWED


def test_nothing_is_evaluated_unpickled_unpacked_or_given_to_a_shell() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not findings(path.read_text(), path.relative_to(PACKAGE).as_posix())


def test_it_would_be_found() -> None:
    for source in (
        "eval('1')", "exec(text)", "import pickle", "from pickle import loads", "os.system('ls')",
        "subprocess.run('ls')", "f(shell=True)", "f(shell=flag)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(p, allow_pickle=True)",
        "tar.extractall(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "torch.jit.load(p)", "__import__('x')", "gather_object(x)",
    ):  # fmt: skip
        assert len(findings(source)) == 1, source
