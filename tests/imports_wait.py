"""Imported first: what a network does not use waits to be imported, as in the executable."""

from deme_cli.deferred import defer_imports

defer_imports()
