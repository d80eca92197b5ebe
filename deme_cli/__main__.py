"""Entry of `deme` and `python -m deme_cli`: runs the app and turns failures into exit codes."""

from __future__ import annotations

import atexit
import os
import sys
import threading

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


def run() -> None:
    """`main` as a process, which ends at once: to take torch apart would cost it half a second.

    What is to run at exit runs. One that failed, is profiled or traced, or whose threads go on,
    ends as ever.
    """
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12
    tools = map(monitoring.get_tool, range(6)) if monitoring else ()
    is_watched = sys.getprofile() or sys.gettrace() or any(tools)
    others = [one for one in threading.enumerate() if one is not threading.main_thread()]
    if is_watched or sys.flags.interactive or not all(one.daemon for one in others):
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads on: Python has its own words for that
        return
    os._exit(0)


if __name__ == "__main__":
    run()
