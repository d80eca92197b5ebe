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

    try:
        app()
    except DemeError as error:
        if os.environ.get("DEME_DEBUG") == "1":
            raise
        console.error(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
