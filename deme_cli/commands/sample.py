"""placeholder"""


def sample() -> None:
    """Placeholder."""
