"""placeholder"""


def task_vector() -> None:
    """Placeholder."""
