"""`deme analyze`: what each writes and prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_base, write_tiny_expert
from typer.testing import Result

from deme_cli.analysis.settings import ANALYSES
from deme_cli.artifacts import write_artifact
from deme_cli.diffusion.checkpoints import import_model

Deme = Callable[..., Result]
BASE, FIRST, LAST = "base.safetensors", "ft_1of4.safetensors", "ft_4of4.safetensors"
CASES = {  # one of each, cheap, and what it says in a dry run
    "losses": (
        f"{BASE} {FIRST} --data digits --buckets 4 --num 4 -n 2",
        "base, ft_1of4: 16 draws each from digits (held-out)",
    ),
    "forecast": (
        "--data digits --updates 10 --buckets 4 --num 4 -n 2 --config short.toml",
        "2 short experts of 10 updates, plain finetuning of 20; rate 5e-05, batches of 4",
    ),
    "gradients": (
        "--data digits --buckets 4 --num 4 -n 2",
        "100 timesteps in 4 buckets, 16 draws from digits",
    ),
    "activations": (
        f"{FIRST} --data digits --num 4 --controls 1 --range 3/4 --block mid_block",
        "ft_1of4 against base: 4 draws of 50:75 from digits (held-out)",
    ),
    "landscape": (
        f"{BASE} {FIRST} {LAST} --mark ft_2of4.safetensors --data digits --points 3 --num 16 "
        f"--report-num 16",
        "9 points of 16 draws from digits (train), for all timesteps and each of 0:25, 25:50, "
        "50:75, 75:100",
    ),
    "task-vectors": (f"{FIRST} {LAST}", "2 experts of base.safetensors: 144 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANALYSES)
def test_each_writes_a_document_and_a_picture_once(deme: Deme, run_folder: Path, kind: str) -> None:
    typed, told = CASES[kind]
    Path("short.toml").write_text("[finetune]\nbatch_size = 4\n")
    before = sorted(Path().iterdir())
    assert told in deme("analyze", kind, *typed.split(), "--dry-run").stderr
    assert sorted(Path().iterdir()) == before
    made = deme("analyze", kind, *typed.split(), "--json")
    assert made.exit_code == 0, made.exception
    printed, document = json.loads(made.stdout), json.loads(Path(f"{kind}.json").read_text())
    assert printed.pop("paths") == [f"{kind}.json", f"{kind}.png"]
    assert (document["kind"], document["schema_version"]) == (kind, 1)
    assert printed == {name: document[name] for name in printed}
    assert {"reading", "protocol"} <= {*document}
    assert document["reading"].split()[0] in made.stderr
    assert "nan" not in made.stderr
    assert Path(f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(Path().iterdir())) == len(before) + 2


REFUSALS = [
    ("losses", "--buckets 0", 2, "buckets = 0"),
    ("losses", "--buckets 101", 2, "this model has 100 timesteps"),
    ("losses", "--split test", 2, "--split test: expected one of train, held-out"),
    ("losses", f"{BASE} {BASE}", 2, "given twice"),
    ("losses", f"{BASE} other.safetensors", 4, "another shape of x_t"),
    ("losses", "none.safetensors", 3, "no such file"),
    ("losses", f"{BASE} --config bad.toml", 2, "50:200 reaches past the 100 timesteps"),
    ("forecast", "--updates 9", 2, "updates = 9: expected at least 10"),
    ("forecast", "-n 200", 2, "cannot divide 100 timesteps into 200 ranges"),
    ("forecast", "--config empty/deme.toml", 3, "make one with `deme split`"),
    ("gradients", "--buckets 1", 2, "expected at least 2"),
    ("gradients", "--buckets 3 -n 4", 2, "4 ranges of 3 buckets"),
    ("gradients", "-o x.png", 2, "ends in .json"),
    ("gradients", "--data nowhere", 3, "nowhere"),
    ("gradients", "--config none.toml", 3, "none.toml"),
    ("activations", f"{FIRST} --num 0", 2, "num = 0: expected a number above 0"),
    ("activations", f"{FIRST} --range 50:200", 2, "stop <= 100"),
    ("activations", f"{FIRST} --block midblock", 2, "did you mean 'mid_block'"),
    ("activations", f"{FIRST} -o taken.json", 2, "taken.json exists; add --force"),
    ("activations", f"{BASE} {BASE} {BASE}", 2, "3 models given: expected [BASE] EXPERT"),
    ("activations", BASE, 4, "found 'base'; name both: deme analyze"),
    ("activations", "lone/ft_1of4.safetensors --config lone.toml", 3,
     "name both: deme analyze activations BASE lone/ft_1of4.safetensors"),
    ("activations", f"{BASE} {BASE}", 4, "have the same weights"),
    ("activations", f"other.safetensors {FIRST}", 4,
     "ft_1of4.safetensors: another shape of x_t than other.safetensors"),
    ("landscape", f"{BASE} {FIRST}", 2, "2 models given: expected one"),
    ("landscape", f"--mark {BASE}", 2, "--mark: models are marked on the plane"),
    ("landscape", "--points 2", 2, "points = 2: expected at least 3"),
    ("landscape", "-n 101", 2, "cannot divide 100 timesteps into 101 ranges"),
    ("landscape", f"{BASE} {FIRST} {FIRST}", 4, "no plane: their cosine is 1.000000"),
    ("landscape", "--data=", 2, "no images"),
    ("losses", "--config empty/deme.toml", 3, "no models in"),
    ("gradients", "--config empty/deme.toml", 3, "correct [model] base"),
    ("task-vectors", "--config empty/deme.toml", 3, "finetune --range all"),
    ("task-vectors", BASE, 4, "expected an artifact of kind 'expert'"),
    ("task-vectors", f"{FIRST} {FIRST}", 2, "are the same expert"),
    ("task-vectors", "--base wide.safetensors", 4, "was finetuned from base"),
    ("task-vectors", f"{FIRST} ft_1of1.safetensors", 4, "was finetuned from base"),
]  # fmt: skip


@pytest.fixture
def spoilt_folder(run_folder: Path) -> Path:
    for folder in ("lone", "empty"):
        Path(folder).mkdir()
    Path("lone", FIRST).write_bytes(Path(FIRST).read_bytes())
    Path("taken.json").write_text("{}")
    Path("empty", "deme.toml").write_text("")
    Path("bad.toml").write_text('[split]\nranges = ["0:50", "50:200"]\n')
    Path("lone.toml").write_text('[model]\nbase = "none.safetensors"\n')
    write_tiny_base(Path("other.safetensors"), sample_size=16)
    write_tiny_base(Path("wide.safetensors"), seed=1)
    write_tiny_expert(Path("ft_1of1.safetensors"), Path("wide.safetensors"), index=1, of=1)
    return run_folder


def test_bad_input_is_told_before_anything_runs(refuse: Callable, spoilt_folder: Path) -> None:
    for kind, arguments, exit_code, message in REFUSALS:
        has_data = "--data" in arguments or kind == "task-vectors"
        data = [] if has_data else ["--data", "digits"]
        refuse(exit_code, message, "analyze", kind, *data, *arguments.split())


def test_a_split_by_gradient_takes_the_measured_ranges(
    deme: Deme, refuse: Callable, run_folder: Path
) -> None:
    deme("analyze", "gradients", "--data", "digits", "--buckets", 4, "--num", 4, "-n", 2)
    split = ["split", BASE, "-n", 2, "--by", "gradient", "--data", "digits"]
    measured = json.loads(Path("gradients.json").read_text())
    document = json.loads(deme(*split, "--force", "--json").stdout)
    assert document["ranges"] == measured["ranges"]
    command = "deme analyze gradients base.safetensors --data digits -o other/gradients.json"
    assert command in str(deme(*split, "-o", "other").exception)
    assert deme(*split, "-o", "other", "--gradients", "gradients.json").exit_code == 0
    measured["model"] |= {"source": FIRST, "fingerprint": "0" * 64}
    for text, words in ((json.dumps(measured), f"on another model, {FIRST}"), ("{", "anew")):
        Path("gradients.json").write_text(text)
        refuse(4, words, *split, "--force")


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("losses", "sd3", "--buckets 2 --num 2 -n 2"),
        ("gradients", "dit", "--num 2 --buckets 2 -n 2"),
        ("landscape", "sd3", "--points 3 --num 16 --report-num 16 -n 2"),
        ("activations", "dit", "--num 2 --split train --controls 0"),
    ],
)
def test_latents_captions_classes_and_flow_are_measured_too(
    deme: Deme, pipelines: Callable[..., Path], image_folder: Path, kind: str, name: str,
    options: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(image_folder.parent)
    lines = [
        f'{{"file_name": "{i:02d}.png", "text": "thing", "label": {i % 5}}}' for i in range(10)
    ]
    (image_folder / "metadata.jsonl").write_text("\n".join(lines))
    models = [pipelines(name)]
    if kind == "activations":  # tokens are places; the first block is before any change
        model = import_model(str(models[0]))
        second = {n: w for n, w in model.weights.items() if n.startswith("transformer_blocks.1")}
        changed = {**model.weights, **{n: 1.05 * weight for n, weight in second.items()}}
        write_artifact(Path("changed.safetensors"), changed, model.record)
        models.append(Path("changed.safetensors"))
    result = deme("analyze", kind, *models, "--data", image_folder, *options.split())
    assert result.exit_code == 0, result.exception
    document = json.loads(Path(f"{kind}.json").read_text())
    if kind == "landscape":
        assert sum(row["draws"] for row in document["groups"][1:]) == 16
    elif kind == "activations":
        first, drawn = document["blocks"][0], document["drawn"]
        assert (first["size"], first["controls"]) == (0, None)
        assert first["shares"] == {"channel": None, "place": None, "rest": None}
        assert (drawn["name"], drawn["grid"]) == ("transformer_blocks.1", [4, 4])


def test_one_vector_alone_has_no_pairs_and_one_model_alone_no_changes(
    deme: Deme, run_folder: Path
) -> None:
    assert deme("task-vector", FIRST).exit_code == 0
    assert deme("analyze", "task-vectors", "tv_1of4.safetensors").exit_code == 0
    document = json.loads(Path("task-vectors.json").read_text())
    assert document["pairs"]["mean_cosine"] is None
    assert "cosine" not in document["reading"]
    few = ["--data", "digits", "--buckets", 4, "--num", 4]
    assert "the loss of base is " in deme("analyze", "losses", BASE, *few).stderr
