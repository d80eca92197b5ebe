"""The merging methods through the command line, their report, and their files made again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_tiny_expert

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.merging.power_ema import coefficients_for_length
from deme_cli.training.power_profile import gamma_of

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
ALL = tuple(f"ft_{index}of4.safetensors" for index in range(1, 5))
MERGED = Path("merged.safetensors")
WAYS = {
    "ties": (*ALL, "--method", "ties", "--density", "0.2", "-w", "1,1,0.5,1"),
    "dare": (*ALL, "--method", "dare", "--density", "0.4", "-w", "1,1,0,1"),
    "slerp": (*PAIR, "--method", "slerp", "-w", "0.3,0.7"),
    "model-stock": (*ALL, "--method", "model-stock"),
    "globs": (*ALL, "-w", "1,0,0,0", "--coefficients-for", "mid_block.*=0,1,0,0"),
}


def run_file(merge: str) -> None:
    Path("deme.toml").write_text(f"[merge]\n{merge}\n")


def merged(deme: Callable, *words: object) -> dict:
    """The JSON document of a merge that went well."""
    result = deme("merge", *words, "--json")
    assert result.exit_code == 0, repr(result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("way", WAYS)
def test_a_merged_file_is_made_again_byte_by_byte(
    run_folder: Path, deme: Callable, way: str
) -> None:
    run_file('trim = "tensor"\nmask_seed = 3')
    document = merged(deme, *WAYS[way])
    assert document["method"] == read_record(MERGED).method
    result = deme("merge", "--replay", MERGED)
    assert result.exit_code == 0, repr(result.exception)
    assert result.stdout.strip() == "merged.replayed.safetensors"
    assert f"equal to {MERGED}, fingerprint {document['fingerprint'][:12]}" in result.stderr
    assert Path("merged.replayed.safetensors").read_bytes() == MERGED.read_bytes()


def test_a_replay_takes_parents_that_have_moved(run_folder: Path, deme: Callable) -> None:
    made = merged(deme, *PAIR, "-w", "0.5,0.25")
    Path("else").mkdir()
    moved = [shutil.move(path, f"else/x{index}.safetensors") for index, path in enumerate(PAIR)]
    result = deme("merge", "--replay", MERGED, *moved, "-o", "b.safetensors", "--json")
    assert json.loads(result.stdout)["fingerprint"] == made["fingerprint"]
    assert Path("b.safetensors").read_bytes() == MERGED.read_bytes()
    kept = deme("merge", "--replay", MERGED, *moved, "-o", "b.safetensors")
    assert "--force" in str(kept.exception)


def test_settings_of_a_method_are_those_of_its_record(run_folder: Path, deme: Callable) -> None:
    merged(deme, ALL[0], "--method", "ties", "--density", "0.25", "-w", "1")
    theta, made = load_tensors(Path("base.safetensors")), load_tensors(MERGED)
    moved = sum((made[name] != theta[name]).sum().item() for name in theta)
    assert moved / sum(t.numel() for t in theta.values()) == pytest.approx(0.25, abs=0.01)
    assert read_record(MERGED).settings == {"density": 0.25, "trim": "model"}
    run_file("mask_seed = 1")
    merged(deme, *PAIR, "--method", "dare", "-o", "dare.safetensors")
    assert read_record(Path("dare.safetensors")).settings == {"density": 0.5, "seed": 1}
    found = merged(deme, *ALL, "--method", "model-stock", "-o", "stock.safetensors")["coefficients"]
    assert len(set(found)) == 1
    assert 0 < sum(found) < 1, "between the base and the mean"


def test_snapshots_of_one_run_make_an_ema_of_another_length(
    run_folder: Path, deme: Callable
) -> None:
    base, paths = Path("base.safetensors"), []
    for number, (step, length) in enumerate([(50, 0.05), (50, 0.1), (100, 0.05), (100, 0.1)]):
        paths.append(Path(f"snapshot_{number}.safetensors"))
        record = write_tiny_expert(paths[-1], base, index=1, of=4, scale=0.01 * (number + 1))
        training = {"ema_length": length, "ema_gamma": gamma_of(length)}
        record = replace(record, steps=step, training=training)
        write_artifact(paths[-1], load_tensors(paths[-1]), record)
    expected = coefficients_for_length([read_record(path) for path in paths], 0.07)
    document = merged(deme, *paths, "--ema-length", "0.07")
    assert document["coefficients"] == pytest.approx(expected)
    assert document["search"]["method"] == "post-hoc EMA"
    kept = merged(deme, *paths, "--ema-length", "0.1", "-o", "kept.safetensors")
    assert kept["coefficients"] == pytest.approx([0, 0, 0, 1], abs=1e-9)


@pytest.mark.parametrize(
    "words",
    [(*ALL, "-w", "0.25,0.5,0,0"), (*PAIR, "--method", "slerp")],
    ids=["linear", "slerp"],
)
def test_any_merge_can_be_reported_beside_the_others(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    run_file("report_repeats = 2")
    result = deme("merge", *words, "--report", "--num", "16", "--json")
    assert result.exit_code == 0, repr(result.exception)
    document = json.loads(result.stdout)
    rows = {row["name"]: row for row in document["report"]["rows"]}
    is_whole = ALL[3] in words
    alone = [f"expert {name[3:7]}" for name in words if str(name).startswith("ft_")]
    assert list(rows) == [
        "base", *(["ensemble"] if is_whole else []), "1/N each", "1 each", *alone, "merged"
    ]  # fmt: skip
    assert rows["base"]["metrics"]["loss"]["difference"] == 0
    assert len(rows["merged"]["metrics"]["loss"]["values"]) == 2
    assert "2 report seeds" in result.stderr
    assert "Loss by range of timesteps" in result.stderr
    assert ("do not cover all timesteps" in result.stderr) is not is_whole
    assert read_record(MERGED).report == document["report"]
    assert document["search"] is None


def test_after_a_search_the_report_is_made_by_itself_on_other_seeds_and_images(
    run_folder: Path, deme: Callable
) -> None:
    run_file("report_num = 12\nreport_repeats = 1")
    document = merged(deme, *ALL, "--search", "random", "--evaluations", "3", "--num", "16",
                      "--objective", "loss:2,fid@12", "--steps", "2")  # fmt: skip
    report = document["report"]
    names = [row["name"] for row in report["rows"]]
    assert names[:2] == ["base", "ensemble"]
    assert "greedy soup" in names
    assert report["rows"][-1]["coefficients"] == document["coefficients"]
    loss, distance = report["protocols"]
    assert (loss["name"], distance["name"]) == ("loss", "frechet_digits")
    search = document["search"]["protocol"]
    assert (search["split"], distance["split"]) == ("train", "held-out")
    assert loss["split"] == "held-out, part 2 of 2"
    used = {protocol["seed"] + i for protocol in (loss, distance) for i in range(3)}
    assert search["seed"] == report["selection_seed"] not in used


def test_a_search_ends_in_one_line_that_says_what_it_is_worth_and_how_sure_that_is(
    run_folder: Path, deme: Callable
) -> None:
    run_file("report_repeats = 2")
    words = (*ALL, "--search", "grid", "--grid", "0;0;0,1;0", "--num", "64")
    result = deme("merge", *words, "--json")
    assert result.exit_code == 0, repr(result.exception)
    assert "by loss (the default) on digits" in result.stderr.splitlines()[0]
    report = json.loads(result.stdout)["report"]
    assert result.stderr.splitlines()[-1] == f"{MERGED}: {report['verdict']}"
    rows = {row["name"]: row["metrics"]["loss"] for row in report["rows"]}
    difference, (low, high) = rows["merged"]["difference"], rows["merged"]["interval"]
    how = "not told apart from" if low <= 0 <= high else "better than" if high < 0 else "worse than"
    assert f"{how} the base ({difference:+.4f}" in report["verdict"]
    assert "the same as the greedy soup" in report["verdict"], "both are expert 3 alone"
    for line_of in (r"^ (?:base|ensemble|1 each|expert \dof4|merged) +([\d.]+)",
                    r"^ \d+ .* ([\d.]+) +[\d.]+ $"):  # fmt: skip
        found = re.findall(line_of, result.stderr, re.MULTILINE)
        assert len(found) >= 4
        assert len({len(number.partition(".")[2]) for number in found}) == 1, found
