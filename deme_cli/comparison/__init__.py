"""One fair comparison: rows of methods under one protocol, from a plan to a table."""
