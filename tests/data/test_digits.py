"""The embedded digits are scikit-learn's, in 256 levels, with every fifth kept for testing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deme_cli.config import TABLES
from deme_cli.data import digits
from deme_cli.data.digits import DIGITS_SETTINGS
from deme_cli.errors import MissingError


def test_the_digits_are_those_of_scikit_learn() -> None:
    expected = np.rint(load_digits().images * 255 / 16)
    images = digits.load_digits("all")[0]
    assert images.dtype == np.uint8
    assert images.shape == (1797, 8, 8, 1)
    assert np.array_equal(images[..., 0], expected)


def test_the_settings_written_for_digits_are_known_settings() -> None:
    for table, values in DIGITS_SETTINGS.items():
        TABLES[table](**values)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="scikit-learn"):
        digits.load_digits("all")[0]
