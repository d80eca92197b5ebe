"""`merge --search` from the command line to the merged file, its journal and its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import MergeConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.merging.combine import merge_artifacts
from deme_cli.merging.journal import read_journal
from deme_cli.merging.objectives import SEARCH, HeldOutLoss
from deme_cli.sampling.ensemble import single
from deme_cli.training.examples import PixelExamples

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
FAST = ("--num", "16", "--no-report")
MERGED, JOURNAL = "merged.safetensors", "merged.trials.jsonl"


def searched(deme: Callable, *words: object) -> dict:
    """The JSON document of a search over PAIR that went well."""
    result = deme("merge", *PAIR, *words, "--json")
    assert result.exit_code == 0, repr(result.exception)
    return json.loads(result.stdout)


def run_file(merge: str) -> None:
    Path("deme.toml").write_text(f"[merge]\n{merge}\n")


def tried(journal: Path) -> list[dict]:
    """Name, coefficients by expert and objective of each trial, as `--show --json` tells them."""
    return [
        {"name": t.name, "rung": t.stage, "value": t.value, "point": t.point}
        for t in read_journal(journal)[2]
    ]


@pytest.mark.parametrize(
    ("search", "words", "least"),
    [
        ("grid", ("--grid", "0,0.5"), 4),
        ("random", ("--evaluations", "5"), 6),
        ("cmaes", ("--evaluations", "7"), 9),
        ("tpe", ("--evaluations", "11"), 13),
        ("gradient", ("--evaluations", "3"), 4),
    ],
)
def test_every_search_ends_in_the_best_of_its_trials(
    run_folder: Path, deme: Callable, search: str, words: tuple[str, ...], least: int
) -> None:
    result = deme("merge", *PAIR, "--search", search, *words, *FAST)
    assert result.exit_code == 0, repr(result.exception)
    assert result.stdout.split() == [MERGED, "merged.search.png", JOURNAL]
    trials = tried(run_folder / JOURNAL)
    assert [trial["name"] for trial in trials[:2]] == ["base", "1/N each"]
    assert len(trials) >= least
    assert len({trial["point"] for trial in trials}) == len(trials), "a point was tried twice"
    assert all(-0.5 <= w <= 1.5 for trial in trials for w in trial["point"])
    best = min(trials, key=lambda trial: trial["value"])
    record = read_record(run_folder / MERGED, "merged")
    assert record.coefficients == pytest.approx(best["point"])
    assert record.search["method"] == search
    assert record.search["best"] == best["value"] == record.search["values"]["best"]
    assert record.search["evaluations"] == len(trials)
    assert read_journal(run_folder / JOURNAL)[3] == record.fingerprint
    with Image.open(run_folder / "merged.search.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert not [path.name for path in run_folder.glob(".*")], "no lock is left"


def test_a_search_finds_what_brute_force_finds(run_folder: Path, deme: Callable) -> None:
    words = ("--search", "grid", "--grid", "0,0.5;0,1", *FAST)
    document = searched(deme, *words)
    base = load_denoiser(run_folder / "base.safetensors")
    data = open_images("digits", shape=base.sample_shape, split="held-out")
    loss = HeldOutLoss(PixelExamples(data), base.schedule, MergeConfig(num=16), SEARCH)
    values = {}
    for point in ((0, 0), (0.5, 0), (0, 1), (0.5, 1), (0.5, 0.5)):
        path = run_folder / "candidate.safetensors"
        merge_artifacts(run_folder / "base.safetensors", list(map(Path, PAIR)), point, path)
        values[point] = loss(single(load_denoiser(path)), lambda: None)
    winner = min(values, key=values.__getitem__)
    assert tuple(document["coefficients"]) == winner
    assert document["evaluations"] == 5
    search = read_record(run_folder / MERGED).search
    assert document["search"] == search
    assert document["objective"] == search["best"] == pytest.approx(values[winner], rel=1e-5)
    assert search["values"]["base"] == pytest.approx(values[0, 0], rel=1e-5)
    assert search["values"]["mean"] == pytest.approx(values[0.5, 0.5], rel=1e-5)
    (stage,) = search["rungs"]
    assert (stage["objective"], stage["num"], stage["evaluations"]) == ("loss", 16, 5)
    assert stage["rho_to_next"] is None
    assert search["protocol"]["split"] == "held-out, part 1 of 2"


def test_the_best_are_shown_and_the_document_has_nothing_beside_it(
    run_folder: Path, deme: Callable
) -> None:
    result = deme("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", *FAST, "--json")
    document = json.loads(result.stdout)
    assert document["paths"] == [MERGED, "merged.search.png", JOURNAL]
    assert {"schema_version", "path", "fingerprint", "parents", "method", "coefficients",
            "coefficients_for", "objective", "evaluations", "search", "report",
            "paths"} == set(document)  # fmt: skip
    assert "held-out loss: the best of 4" in result.stderr
    assert "trial 4" in result.stderr
    quiet = deme(
        "merge", *PAIR, "--search", "grid", "--grid", "0,1", *FAST, "--quiet", "-o", "q.safetensors"
    )
    assert quiet.stderr == ""


def test_a_search_by_distance_tells_its_protocol(run_folder: Path, deme: Callable) -> None:
    search = searched(
        deme, "--search", "grid", "--objective", "fid", "--grid", "0,0.5", "--num", "8",
        "--steps", "2", "--no-report",
    )["search"]  # fmt: skip
    assert search["objective"] == "frechet_digits"
    assert search["protocol"]["steps"] == 2
    assert search["protocol"]["seed"] == search["seed"] == 1_000_003
    assert search["protocol"]["split"] == "train"
    assert "fid" not in json.dumps(search).lower()


def test_a_ladder_judges_fewer_and_fewer(run_folder: Path, deme: Callable) -> None:
    search = searched(
        deme, "--search", "random", "--evaluations", "6", "--objective", "loss:3,kid@8:2,fid@12",
        "--steps", "2", *FAST,
    )["search"]  # fmt: skip
    assert search["objective"] == "frechet_digits"
    stages = search["rungs"]
    assert [stage["objective"] for stage in stages] == ["loss", "kernel_digits", "frechet_digits"]
    assert [stage["num"] for stage in stages] == [16, 8, 12]
    assert [stage["keep"] for stage in stages] == [3, 2, 10]
    assert stages[0]["evaluations"] >= 7
    assert [stage["evaluations"] for stage in stages[1:]] == [3 + 2, 2 + 2], "base and mean pass"
    assert all(-1 <= stage["rho_to_next"] <= 1 for stage in stages[:2])
    trials = tried(run_folder / JOURNAL)
    points = [{t["point"] for t in trials if t["rung"] == stage} for stage in range(3)]
    assert points[0] > points[1] > points[2]
    by_loss = sorted(
        (t for t in trials if t["rung"] == 0 and not t["name"]), key=lambda t: t["value"]
    )
    assert {t["point"] for t in by_loss[:3]} <= points[1]
    last = [t for t in trials if t["rung"] == 2]
    best = min(last, key=lambda t: t["value"])
    assert tuple(read_record(run_folder / MERGED).coefficients) == best["point"]
    assert search["values"]["base"] in [t["value"] for t in last]
    assert not list(run_folder.glob(".*features*")), "drawn features are cleared away"


@pytest.mark.parametrize(
    ("per", "words"),
    [
        ("block", ("--search", "gradient", "--evaluations", "2")),
        ("layer", ("--search", "gradient", "--evaluations", "2")),
        ("block", ("--search", "cmaes", "--evaluations", "3")),
    ],
)
def test_blocks_and_layers_get_coefficients_of_their_own(
    run_folder: Path, deme: Callable, per: str, words: tuple[str, ...]
) -> None:
    document = searched(deme, *words, "--per", per, *FAST)
    finer = document["coefficients_for"]
    assert len(finer) >= (5 if per == "block" else 40)
    if words[1] == "gradient":
        assert len(set(map(tuple, finer.values()))) > len(finer) / 2
    theta = load_tensors(run_folder / "base.safetensors")
    experts = [load_tensors(run_folder / path) for path in PAIR]
    merged = load_tensors(run_folder / MERGED)
    for name in ("mid_block.attentions.0.to_q.weight", "up_blocks.1.resnets.0.conv1.bias"):
        module = name.rpartition(".")[0] if per == "layer" else name.split(".attentions")[0]
        group = f"{module.split('.resnets')[0] if per == 'block' else module}.*"
        expected = theta[name] + sum(
            w * (expert[name] - theta[name])
            for w, expert in zip(finer[group], experts, strict=True)
        )
        assert merged[name].numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_given_coefficients_of_a_glob_stay_while_the_others_are_searched(
    run_folder: Path, deme: Callable
) -> None:
    document = searched(
        deme, "--search", "gradient", "--evaluations", "2", "--per", "block",
        "--coefficients-for", "mid_block.*=0.75,-0.25", *FAST,
    )  # fmt: skip
    finer = document["coefficients_for"]
    assert finer["mid_block.*"] == [0.75, -0.25]
    assert len(finer) == 5
    assert all("mid_block" not in label for label in read_journal(run_folder / JOURNAL)[1])
    one = searched(
        deme, "--search", "grid", "--grid", "0.5", "--coefficients-for", "mid_block.*=0.75,-0.25",
        *FAST, "-o", "one.safetensors",
    )  # fmt: skip
    assert one["coefficients_for"] == {"mid_block.*": [0.75, -0.25]}
    assert one["coefficients"] in ([0.5, 0.5], [0.0, 0.0])


def test_a_search_keeps_to_bounds_start_and_number_of_evaluations(
    run_folder: Path, deme: Callable
) -> None:
    run_file("bounds = [[0, 0.25], [-2, -1]]\nstart = [0.125, -1.5]")
    document = searched(
        deme, "--search", "random", "--evaluations", "6", *FAST,
    )  # fmt: skip
    assert document["search"]["bounds"] == [[0, 0.25], [-2, -1]]
    points = [trial["point"] for trial in tried(run_folder / JOURNAL)]
    assert points[:3] == [(0, 0), (0.5, 0.5), (0.125, -1.5)]
    assert len(points) == 8
    assert all(0 <= a <= 0.25 and -2 <= b <= -1 for a, b in points[2:])


def test_a_search_whose_time_is_up_takes_the_best_so_far(run_folder: Path, deme: Callable) -> None:
    run_file('time = "0.001s"')
    document = searched(deme, "--search", "random", *FAST)
    assert document["evaluations"] == 2
    assert read_journal(run_folder / JOURNAL)[3] == document["fingerprint"]


def test_ties_and_dare_are_searched_as_they_are_merged(run_folder: Path, deme: Callable) -> None:
    for method in ("ties", "dare"):
        words = ("--method", method, "--density", "0.3", "-o", f"{method}.safetensors")
        document = searched(deme, "--search", "gradient", "--evaluations", "3", *words, *FAST)
        w = ",".join(map(repr, document["coefficients"]))
        given = ("--method", method, "--density", "0.3", "-o", "given.safetensors", "--force")
        assert searched(deme, "-w", w, *given)["fingerprint"] == document["fingerprint"]
        loss = HeldOutLoss(
            PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out")),
            load_denoiser(Path("base.safetensors")).schedule, MergeConfig(num=16), SEARCH,
        )  # fmt: skip
        found = loss(single(load_denoiser(run_folder / f"{method}.safetensors")), lambda: None)
        assert found == pytest.approx(document["objective"], rel=1e-5)
