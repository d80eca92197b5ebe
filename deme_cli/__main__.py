"""Entry of `deme` and `python -m deme_cli`: runs the app and turns failures into exit codes."""

from __future__ import annotations

import os
import sys

from deme_cli import console, distributed
from deme_cli.deferred import defer_imports
from deme_cli.errors import DemeError, out_of_memory_as
from deme_cli.jobs import signals_end_the_command

TOO_MUCH_AT_ONCE = (
    "this does not fit into the memory of the device; use a smaller --batch-size, --dtype bf16, or "
    "a device with more memory"
)


def main() -> None:
    """Run the command line; exits with the codes of the contract.

    A `DemeError` is one line on stderr; anything else is a bug and keeps its traceback (exit 1).
    DEME_DEBUG=1 shows the traceback of a `DemeError` too. Of joined processes the one that fails
    first says why, and all exit alike.
    """
    # Two OpenMP threads that spin between small operations slow a shared machine many times over;
    # passive ones sleep. Read by the OpenMP runtime when torch loads, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    defer_imports()
    has_failed = True
    try:
        with signals_end_the_command(), out_of_memory_as(TOO_MUCH_AT_ONCE):
            from deme_cli.app import app

            app(prog_name="deme")
    except SystemExit as done:
        has_failed = bool(done.code)
        raise
    except DemeError as error:
        is_ours, exit_code = distributed.joined().fail(error)
        console.unmute()
        if os.environ.get("DEME_DEBUG") == "1":
            raise
        if is_ours:
            console.error(str(error))
        sys.exit(exit_code)
    finally:
        if has_failed:
            console.unmute()  # for a traceback
        distributed.joined().leave(has_failed=has_failed)


if __name__ == "__main__":
    main()
