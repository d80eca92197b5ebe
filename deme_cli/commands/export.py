"""placeholder"""


def export() -> None:
    """Placeholder."""
