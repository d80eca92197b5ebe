"""placeholder"""


def merge() -> None:
    """Placeholder."""
