"""placeholder"""


def stats() -> None:
    """Placeholder."""
