"""placeholder"""


def ensemble_sample() -> None:
    """Placeholder."""
