"""placeholder"""


def split() -> None:
    """Placeholder."""
