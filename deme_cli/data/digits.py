"""The embedded data: scikit-learn's 1,797 handwritten digits, 8x8 pixels in 17 grey levels.

They come from the test part of Alpaydin and Kaynak's optical recognition set (UCI, 1998) and ship
with scikit-learn, so that the whole pipeline runs without a download. A mirrored digit is no digit:
they are never flipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.errors import MissingError

if TYPE_CHECKING:
    import numpy as np

EMBEDDED = Path(__file__).parent / "embedded"
BASE_PATH = EMBEDDED / "digits-base.safetensors"
LARGEST_LEVEL = 16
TEST_EVERY = 5
_WORDS = "zero one two three four five six seven eight nine"
DIGIT_CAPTIONS = tuple(f"a {word}" for word in _WORDS.split())

# What `deme split digits` writes live into deme.toml, by table: settings for a model this small,
# and what is said of them there.
DIGITS_REMARK = """\
# Not the paper's settings, but those that suit this small model and 400 updates: a learning rate of
# 2e-3 (paper: 5e-5), and no consistency loss (paper: 1.0). Fréchet distances of ensemble, merged:
# 1.62, 2.50 so; 2.36, 2.72 with `consistency = 1.0`; 2.75, 2.98 with both; the base has 3.79.
"""
DIGITS_SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": {
        "steps": 400,
        "batch_size": 128,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup": 20,
        "consistency": 0.0,
        "checkpoint_every": 200,
    },
    # by held-out loss the base itself wins: it is where that loss no longer falls
    "merge": {"objective": "fid", "num": 500, "batch_size": 500},
    "sample": {"steps": 20, "batch_size": 1000},
    "eval": {"fid": "digits", "num": 2000, "repeats": 3},
}


def load_digits(split: str) -> tuple[np.ndarray, list[int]]:
    """The digits as uint8 (n, 8, 8, 1), levels 0..16 as round(v * 255 / 16); and which each is.

    split: `test` is every fifth image (index % 5 == 4), `train` the rest, `all` both in order.
    """
    import numpy as np

    package = importlib.util.find_spec("sklearn")  # not imported, which takes seconds
    if package is None or package.origin is None:
        raise MissingError(
            "the digits come with scikit-learn; install it: pip install scikit-learn"
        )
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(path, delimiter=",")  # 64 levels and the label
    levels, labels = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1].astype(int)
    images = np.rint(levels * (255 / LARGEST_LEVEL)).astype(np.uint8)
    is_test = np.arange(len(images)) % TEST_EVERY == TEST_EVERY - 1
    chosen = {"all": is_test | ~is_test, "test": is_test, "train": ~is_test}[split]
    return images[chosen], labels[chosen].tolist()
