"""Entry of `deme` and `python -m deme_cli`: runs the app and turns failures into exit codes."""

from __future__ import annotations

import os
import sys

from deme_cli import console
from deme_cli.errors import DemeError


def main() -> None:
    """Run the command line; exits with the codes of the contract.

    A `DemeError` is one line on stderr; anything else is a bug and keeps its traceback (exit 1).
    DEME_DEBUG=1 shows the traceback of a `DemeError` too.
    """
    # Two OpenMP threads that spin between small operations slow a shared machine many times over;
    # passive ones sleep. Read by the OpenMP runtime when torch loads, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from deme_cli.app import app

    if not {"-h", "--help"}.isdisjoint(sys.argv) or len(sys.argv) == 1:
        _import_help_renderer()
    try:
        app()
    except DemeError as error:
        if os.environ.get("DEME_DEBUG") == "1":
            raise
        console.error(str(error))
        sys.exit(error.exit_code)


def _import_help_renderer() -> None:
    """Load Typer's help renderer without two modules it never calls here, half of its import time.

    Help texts are rich markup and not Markdown, and rich tracebacks are off. The placeholders are
    taken away again: whoever imports these modules later gets the real ones.
    """
    from types import ModuleType

    unused = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
    placed = [name for name in unused if name not in sys.modules]
    for name in placed:
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], unused[name], None)
    import typer.rich_utils  # noqa: F401

    for name in placed:
        del sys.modules[name]


if __name__ == "__main__":
    main()
