"""`deme eval` from the command line: tables, JSON, the gate, and what is told when things lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins import write_statistics_npz
from tiny_clip import write_clip
from typer.testing import Result

from deme_cli.artifacts import SamplesRecord, load_tensors, read_record, write_artifact
from deme_cli.data.digits import DIGIT_CAPTIONS, load_digits
from deme_cli.evaluation.clip_score import find_clip, open_clip_scorer
from deme_cli.evaluation.protocols import PROTOCOLS

Deme = Callable[..., Result]
FEW = ("-n", "6", "--steps", "2")
CARD = {"sampler": "ddim", "steps": 50, "spacing": "leading", "eta": 0.0, "clip_sample": True,
        "dtype": "fp32", "forwards": 50, "seed": 0, "num": 40}  # fmt: skip


def document(result: Result) -> dict:
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def test_the_folder_is_measured_against_the_digits(run_folder: Path, deme: Deme) -> None:
    planned = deme("eval", "--fid", "digits", "--dry-run", "--json")
    assert [row["name"] for row in document(planned)["rows"]] == ["base", "ensemble"]
    assert "would measure frechet_digits of base, ensemble against digits" in planned.stderr
    shown = deme("eval", "--fid", "digits", *FEW, "--repeats", "2", "--json")
    base, ensemble = document(shown)["rows"]
    assert (base["name"], base["kind"]) == ("base", "base")
    assert (ensemble["name"], ensemble["kind"]) == ("ensemble", "ensemble")
    figure = ensemble["metrics"]["frechet_digits"]
    assert (figure["n"], figure["repeats"]) == (6, 2)
    assert figure["value"] == pytest.approx(np.mean(figure["values"]))
    assert figure["difference"]["to"] == "base"
    protocol = base["protocol"]
    assert (protocol["seeds"], protocol["features"]) == ([0, 1], "digits")
    assert protocol["references"]["frechet_digits"]["n"] == 359
    assert (protocol["sampler"], protocol["steps"]) == ("ddim", 2)
    assert protocol["versions"]["torch"]
    assert set(base["metrics"]) == {"frechet_digits"}
    for words in ("frechet_digits", "minus base", "ensemble", "6 x 2", "±", "ddim 2 steps",
                  "held-out, 359 images", "seeds 0 to 1"):  # fmt: skip
        assert words in shown.stderr


def test_settings_and_references_come_from_a_deme_toml_and_the_command_line_wins(
    run_folder: Path, deme: Deme, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("deme.toml").write_text(
        '[eval]\nfid = "images"\nfeatures = "digits"\nnum = 5\nseed = 3\n'
        '[sample]\nsteps = 3\nsampler = "ddpm"\n'
    )
    elsewhere = run_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    base, _ = document(deme("eval", "--config", "../deme.toml", "-n", "4", "--json"))["rows"]
    protocol = base["protocol"]
    assert (protocol["num"], protocol["steps"], protocol["sampler"]) == (4, 3, "ddpm")
    assert protocol["seeds"] == [3]
    assert protocol["references"]["frechet_digits"]["n"] == 10


def test_cifar10_runs_through_with_a_stand_in_and_statistics(
    run_folder: Path, cache: Path, stand_in: Path, deme: Deme
) -> None:
    write_statistics_npz(cache / "cifar10_clean_train_32.npz")
    cifar = ("--fid", "cifar10", "--weights", stand_in)
    shown = deme("eval", "base.safetensors", *cifar, *FEW, "--json")
    (row,) = document(shown)["rows"]
    assert row["metrics"]["fid"]["value"] > 0
    assert row["protocol"]["weights_published"] is False
    assert row["protocol"]["references"]["fid"]["file"] == "cifar10_clean_train_32.npz"
    assert "not the published inception weights" in shown.stderr


def test_statistics_of_ones_own_stand_for_the_images(
    run_folder: Path, stand_in: Path, deme: Deme, refuse: Callable
) -> None:
    made = deme("stats", "digits", "-o", "ref.safetensors", "--split", "test", "--json")
    assert document(made)["n"] == 359
    arguments = ("base.safetensors", *FEW, "--json")
    quiet = deme("eval", "--fid", "ref.safetensors", *arguments, "--quiet")
    assert quiet.stderr == ""
    (one,) = document(quiet)["rows"]
    refs = ("--fid", "digits", "--kid", "digits", "--prc", "digits")
    (other,) = document(deme("eval", *refs, *arguments))["rows"]
    shares = {f"{name}_digits" for name in ("precision", "recall", "density", "coverage")}
    assert set(other["metrics"]) == {"frechet_digits", "kernel_digits", *shares}
    assert all(0 <= other["metrics"][name]["value"] <= 2 for name in shares)
    assert other["protocol"]["neighbours"] == 3
    value = other["metrics"]["frechet_digits"]["value"]
    assert one["metrics"]["frechet_digits"]["value"] == pytest.approx(value, rel=1e-9)
    refuse(4, "made with digits", "eval", "--fid", "ref.safetensors", "--features", stand_in)


def test_the_gate_is_met_or_ends_with_a_gate_error(
    run_folder: Path, deme: Deme, refuse: Callable
) -> None:
    arguments = ("eval", "base.safetensors", "--fid", "digits", *FEW)
    passed = deme(*arguments, "--max-fid", "1e6", "-o", "figures.json")
    assert (passed.exit_code, passed.stdout.strip()) == (0, "figures.json")
    assert json.loads(Path("figures.json").read_text())["schema_version"] == 1
    refuse(2, "--force", *arguments, "-o", "figures.json")
    failed = deme(*arguments, "--max-fid", "0.001", "-o", "figures.json", "--force", "--json")
    assert failed.exception.exit_code == 6
    assert "above --max-fid 0.001: base" in str(failed.exception)
    assert json.loads(failed.stdout)["rows"], "the figures are shown all the same"


@pytest.fixture
def digit_samples(run_folder: Path) -> Path:
    """The first forty test digits, each with its caption and class, and a card."""
    images, labels = load_digits("test")
    record = SamplesRecord(
        protocol=CARD, prompts=[DIGIT_CAPTIONS[c] for c in labels[:40]], classes=labels[:40]
    )
    write_artifact(run_folder / "drawn.safetensors", {"images": images[:40]}, record)
    return run_folder / "drawn.safetensors"


def test_the_clip_score_of_samples_that_know_their_prompts_or_are_given_them(
    digit_samples: Path, deme: Deme, refuse: Callable
) -> None:
    clip = f"local-dir:{write_clip(Path('clip'))}"
    scoring = ("--clip-score", "--clip-weights", clip)
    shown = deme("eval", digit_samples, *scoring, "--json")
    (row,) = document(shown)["rows"]
    score = row["metrics"]["clip_score"]
    images = load_tensors(digit_samples)["images"].numpy()
    record = read_record(digit_samples, "samples")
    cosines = open_clip_scorer(find_clip("", clip)).compare(images, record.prompts)[:, 0]
    assert score["value"] == pytest.approx(100 * cosines.mean(), abs=1e-9)
    assert (score["n"], score["repeats"], score["sd"], score["truncated"]) == (40, 1, None, 0)
    assert (score["model"], score["weights"]) == ("clip", "open_clip_model.safetensors")
    assert "clip_score by clip" in shown.stderr
    write_artifact(Path("bare.safetensors"), {"images": images}, SamplesRecord(protocol={}))
    Path("prompts.txt").write_text("\n".join(record.prompts))
    given = deme("eval", "bare.safetensors", *scoring, "--prompts", "prompts.txt", "--json")
    assert document(given)["rows"][0]["metrics"]["clip_score"]["value"] == score["value"]
    refuse(2, "bare: the prompts of its images are not known", "eval", "bare.safetensors", *scoring)


def test_a_text_model_and_its_kept_images_are_scored_by_their_prompts(
    run_folder: Path, deme: Deme, refuse: Callable, pipelines: Callable[..., Path]
) -> None:
    Path("prompts.txt").write_text("a red cat\na seven\n")
    shown = (pipelines("sd"), "--prompts", "prompts.txt", "--per-prompt", 2)
    drawing = (*shown, "--steps", 2, "--guidance", 3)
    for output in ("drawn.safetensors", "pictures"):
        assert deme("sample", *drawing, "-o", output).exit_code == 0
    scoring = ("--clip-score", "--clip-weights", f"local-dir:{write_clip(Path('clip'))}")
    words = ("eval", "drawn.safetensors", "pictures", *drawing, *scoring, "--repeats", 2, "--json")
    rows = document(deme(*words))["rows"]
    *samples, own = [row["metrics"]["clip_score"] for row in rows]
    assert (own["n"], own["repeats"]) == (4, 2)
    protocol = rows[-1]["protocol"]
    assert (protocol["guidance"], protocol["num"], protocol["per_prompt"]) == (3, 4, 2)
    for score in samples:
        assert score["value"] == pytest.approx(own["values"][0])
    refuse(2, "-n says 3", "eval", *drawing, *scoring, "-n", "3")


def test_rows_of_different_protocols_are_refused_unless_mixed(
    digit_samples: Path, image_folder: Path, deme: Deme, refuse: Callable
) -> None:
    """Among them fewer images of another seed."""
    arguments = ("eval", "base.safetensors", "drawn.safetensors", "--fid", "digits", *FEW)
    refuse(2, "base and drawn are of different protocols: steps 2 and", *arguments)
    words = ("-n", 5, "--steps", 3, "--seed", 4, "-o", "five.safetensors")
    assert deme("sample", "base.safetensors", *words).exit_code == 0
    shown = deme(*arguments, "five.safetensors", "--mixed", "--json")
    assert [r["metrics"]["frechet_digits"]["n"] for r in document(shown)["rows"]] == [6, 6, 5]
    told = " ".join(shown.stderr.split())
    for words in ("steps 2 and 50", "five has 5 images, not 6", "base 0, drawn 0, five 4"):
        assert words in told
    folder = ("eval", "base.safetensors", image_folder, "--fid", "digits", *FEW)
    refuse(2, "no protocol card", *folder)
    assert deme(*folder, "--mixed").exit_code == 0


def test_a_protocol_fixes_what_is_measured_and_how(
    run_folder: Path, cache: Path, deme: Deme, refuse: Callable, pipelines: Callable[..., Path]
) -> None:
    pipeline = pipelines("sd")
    write_statistics_npz(Path("imagenet.npz"))
    (cache / "pt_inception-2015-12-05-6726825d.pth").touch()
    clip = cache / "CLIP-ViT-g-14-laion2B-s34B-b88K" / "open_clip_model.safetensors"
    clip.parent.mkdir()
    clip.touch()
    Path("deme.toml").write_text('[sample]\nsteps = 3\nsampler = "ddpm"\n[eval]\nnum = 5\n')
    arguments = ("eval", pipeline, "--protocol", "imagenet", "--dry-run", "--json")
    refuse(2, "measures against ImageNet-1k", *arguments)
    shown = deme(*arguments, "--fid", "imagenet.npz")
    assert document(shown)["protocol"] == "imagenet"
    for words in ("DeMe, Table 2", "not told there: number of images", "pndm 25 steps",
                  "would measure fid, clip_score of sd against imagenet.npz: 50000"):  # fmt: skip
        assert words in shown.stderr
    told = "--steps 50: the protocol imagenet has 25"
    refuse(2, told, *arguments, "--fid", "imagenet.npz", "--steps", "50")


def test_a_protocols_name_is_on_the_card_of_its_rows(
    run_folder: Path, cache: Path, deme: Deme, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(
        PROTOCOLS["ddim-cifar10"], sample={"sampler": "ddim", "steps": 2, "num": 6},
        evaluation={"fid": "digits", "features": "digits", "resize": "clean"},
    )  # fmt: skip
    monkeypatch.setitem(PROTOCOLS, "ddim-cifar10", short)
    shown = deme("eval", "base.safetensors", "--protocol", "ddim-cifar10", "--json")
    (row,) = document(shown)["rows"]
    assert row["protocol"]["protocol"] == "ddim-cifar10"
    assert (row["protocol"]["steps"], row["metrics"]["frechet_digits"]["n"]) == (2, 6)


REFUSED = [
    (("--clip-score", "--clip-model", "ViT"), 2, "no such open_clip architecture"),
    (("--clip-score", "--clip-weights", "x.pt"), 3, "no such file of CLIP weights"),
    (("--protocol", "coco"), 2, "protocol = 'coco'"),
    (("--clip-score", "--weights", "x.pt"), 2, "--weights goes with --fid"),
    (("--clip-score", "--prompts", "x.txt"), 3, "x.txt: no such file"),
    (("--fid", "digits", "--dtype", "fp8"), 2, "--dtype fp8"),
    (("--kid", "digits", "--max-fid", "3"), 2, "--max-fid needs --fid"),
    (("--fid", "digits", "--features", "nothing.pt"), 3, "no such file"),
    (("--fid", "digits", "-o", "nowhere/x.json", "-n", "1"), 2, "at least 2 images"),
    (("--fid", "imagenet"), 3, "deme stats"),
    ((), 2, "as in --fid digits"),
    (("--protocol", "parti"), 3, "PartiPrompts.tsv"),
    (("--clip-score",), 3, "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    (("--fid", "digits", "base.safetensors", "base.safetensors"), 2, "given twice"),
]


def test_bad_input_is_one_clear_line(
    run_folder: Path, cache: Path, stand_in: Path, refuse: Callable
) -> None:
    (cache / "inception-2015-12-05.pt").write_bytes(stand_in.read_bytes())
    for arguments, exit_code, words in REFUSED:
        refuse(exit_code, words, "eval", *arguments)


def test_cifar10_without_network_or_weights_ends_at_once_without_torch(
    run_folder: Path, cache: Path
) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from deme_cli.app import app\n"
        "from deme_cli.__main__ import main\n"
        "assert CliRunner().invoke(app, ['eval', '--fid', 'digits', '--dry-run']).exit_code == 0\n"
        "sys.argv = ['deme', 'eval', '--fid', 'cifar10']\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'diffusers', 'cleanfid', 'scipy'} & set(sys.modules)))"
    )
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # as without a network
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, **nowhere, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 3
    assert time.monotonic() - began < 7  # under 1 s on a machine with nothing else to do
    assert done.stdout == "[]\n"
    assert len(done.stderr.splitlines()) == 1
    for words in ("inception-2015-12-05.pt", "f58cb9b6", "cifar10_clean_train_32.npz", "no answer"):
        assert words in done.stderr
