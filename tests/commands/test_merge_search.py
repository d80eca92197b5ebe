"""`merge --search` from the command line to the merged file, its journal and its picture; stopped,
shared and finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.config import MergeConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import Stopped
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.journal import read_journal
from deme_cli.merging.objectives import HeldOutLoss
from deme_cli.merging.plan import SEARCH
from deme_cli.sampling.ensemble import single
from deme_cli.training.examples import PixelExamples

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
FAST = ("--num", "16", "--no-report")
GRID = ("--search", "grid", "--grid", "0,0.3,0.6,1", "--num", "64", "--no-report")
MERGED, JOURNAL = Path("merged.safetensors"), Path("merged.trials.jsonl")


def searched(deme: Callable, *words: object) -> dict:
    """The JSON document of a search over PAIR that went well."""
    result = deme("merge", *PAIR, *words, "--json")
    assert result.exit_code == 0, repr(result.exception)
    return json.loads(result.stdout)


def tried(journal: Path) -> list[tuple]:
    """Stage, point and value of each trial that counts, in order."""
    return [(t.stage, t.point, t.value) for t in read_journal(journal)[2] if t.is_done]


@pytest.mark.parametrize(
    ("search", "words", "least"),
    [
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
    assert result.stdout.split() == [str(MERGED), "merged.search.png", str(JOURNAL)]
    trials = read_journal(JOURNAL)[2]
    assert [trial.name for trial in trials[:2]] == ["base", "1/N each"]
    assert len({trial.point for trial in trials}) == len(trials) >= least
    best = min(trials, key=lambda trial: trial.value)
    record = read_record(MERGED, "merged")
    assert record.coefficients == pytest.approx(best.point)
    assert record.search["method"] == search
    assert record.search["best"] == best.value == record.search["values"]["best"]
    assert record.search["evaluations"] == len(trials)
    assert read_journal(JOURNAL)[3] == record.fingerprint
    with Image.open("merged.search.png") as picture:
        assert min(picture.size) > 400
    assert not list(run_folder.glob(".*")), "no lock is left"


def test_a_search_finds_what_brute_force_finds_and_tells_of_it(
    run_folder: Path, deme: Callable
) -> None:
    result = deme("merge", *PAIR, "--search", "grid", "--grid", "0,0.5;0,1", *FAST, "--json")
    document = json.loads(result.stdout)
    assert set(document) == {
        "schema_version", "path", "fingerprint", "parents", "method", "adapter", "coefficients",
        "coefficients_for", "objective", "evaluations", "search", "report", "paths",
    }  # fmt: skip
    assert "loss: the best of 5" in result.stderr
    assert "trial 4" in result.stderr
    base = load_denoiser(Path("base.safetensors"))
    data = open_images("digits", shape=base.sample_shape, split="held-out")
    loss = HeldOutLoss(PixelExamples(data), base.schedule, MergeConfig(num=16), SEARCH)
    inputs = open_inputs(Path("base.safetensors"), open_experts(list(map(Path, PAIR)), "expert"))
    values = {}
    for point in ((0, 0), (0.5, 0), (0, 1), (0.5, 1), (0.5, 0.5)):
        path = Path("candidate.safetensors")
        merge_inputs(inputs, point, path)
        values[point] = loss(single(load_denoiser(path)), lambda: None)
    winner = min(values, key=values.__getitem__)
    assert tuple(document["coefficients"]) == winner
    search = read_record(MERGED).search
    assert document["search"] == search
    assert document["objective"] == search["best"] == pytest.approx(values[winner], rel=1e-5)
    assert search["values"]["base"] == pytest.approx(values[0, 0], rel=1e-5)
    assert search["values"]["mean"] == pytest.approx(values[0.5, 0.5], rel=1e-5)
    assert search["protocol"]["split"] == "held-out, part 1 of 2"
    quiet = deme("merge", *PAIR, "--search", "grid", *FAST, "--quiet", "-o", "q.safetensors")
    assert quiet.stderr == ""


def test_objectives_in_turn_judge_fewer_and_fewer(run_folder: Path, deme: Callable) -> None:
    search = searched(
        deme, "--search", "random", "--evaluations", "6", "--objective", "loss:3,kid@8:2,fid@12",
        "--steps", "2", *FAST,
    )["search"]  # fmt: skip
    assert search["objective"] == "frechet_digits"
    assert search["protocol"]["steps"] == 2
    assert search["protocol"]["seed"] == search["seed"] == 1_000_003
    assert "fid" not in json.dumps(search).lower()
    stages = search["rungs"]
    assert [stage["objective"] for stage in stages] == ["loss", "kernel_digits", "frechet_digits"]
    assert [stage["num"] for stage in stages] == [16, 8, 12]
    assert [stage["keep"] for stage in stages] == [3, 2, 10]
    assert [stage["evaluations"] for stage in stages] == [7, 3 + 2, 2 + 2], "base and mean pass"
    last = {point: value for stage, point, value in tried(JOURNAL) if stage == 2}
    assert tuple(read_record(MERGED).coefficients) == min(last, key=last.__getitem__)


@pytest.mark.parametrize(("per", "search"), [("block", "cmaes"), ("layer", "gradient")])
def test_blocks_and_layers_get_coefficients_of_their_own(
    run_folder: Path, deme: Callable, per: str, search: str
) -> None:
    given = {"mid_block.attentions.*": [0.5, 0.0], "mid_block.*": [0.75, -0.25]}
    globs = [f"--coefficients-for={glob}={w[0]},{w[1]}" for glob, w in given.items()]
    document = searched(deme, "--search", search, "--evaluations", "2", "--per", per, *FAST, *globs)
    finer = document["coefficients_for"]
    assert list(finer.items())[:2] == list(given.items()), "what is given stays, and comes first"
    assert all("mid_block" not in label for label in read_journal(JOURNAL)[1])
    assert len(finer) >= (5 if per == "block" else 40)
    theta = load_tensors(run_folder / "base.safetensors")
    experts = [load_tensors(run_folder / path) for path in PAIR]
    merged = load_tensors(run_folder / MERGED)
    for name in ("mid_block.attentions.0.to_q.weight", "up_blocks.1.resnets.0.conv1.bias"):
        group = f"{name.rpartition('.')[0] if per == 'layer' else name.split('.resnets')[0]}.*"
        w = finer.get(group, given["mid_block.attentions.*"])
        taus = [expert[name] - theta[name] for expert in experts]
        expected = theta[name] + w[0] * taus[0] + w[1] * taus[1]
        assert merged[name].numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_search_keeps_to_bounds_start_and_budgets(run_folder: Path, deme: Callable) -> None:
    table = "[merge]\nbounds = [[0, 0.25], [-2, -1]]\nstart = [0.125, -1.5]\n"
    Path("deme.toml").write_text(table)
    words = ("--search", "random", *FAST)
    document = searched(deme, *words, "--evaluations", "3")
    assert document["search"]["bounds"] == [[0, 0.25], [-2, -1]]
    few = tried(JOURNAL)
    assert [point for _, point, _ in few[:3]] == [(0, 0), (0.5, 0.5), (0.125, -1.5)]
    assert all(0 <= a <= 0.25 and -2 <= b <= -1 for _, (a, b), _ in few[2:])
    MERGED.unlink()
    searched(deme, *words, "--evaluations", "6")
    assert tried(JOURNAL)[:5] == few, "more evaluations go on from those there are"
    assert len(tried(JOURNAL)) == 8
    Path("deme.toml").write_text(f'{table}time = "0.001s"\n')
    document = searched(deme, *words, "-o", "short.safetensors")
    assert document["evaluations"] == 2


def test_one_expert_alone_is_searched_as_well(run_folder: Path, deme: Callable) -> None:
    words = ("--search", "cmaes", "--evaluations", "3", "--num", "8", "--json")
    document = json.loads(deme("merge", PAIR[0], *words).stdout)
    assert len(document["coefficients"]) == 1
    assert [row["name"] for row in document["report"]["rows"]] == ["base", "1/N each", "merged"]


def stop_after(deme: Callable, trials: int, *words: object) -> Result:
    """Run the command; from the time the journal holds so many finished trials, send SIGTERM."""
    ended = threading.Event()

    def stop() -> None:
        done = 0
        while not ended.wait(0.002):
            if done < trials:
                done = JOURNAL.read_text().count('"op_code":6') if JOURNAL.exists() else 0
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.wait(0.05)  # again, should nobody have listened

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return deme(*words)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "words",
    [
        ("--search", "cmaes", "--evaluations", "18", "--num", "32", "--no-report"),
        ("--search", "gradient", "--evaluations", "7", "--per", "block", "--num", "64",
         "--no-report"),
    ],
    ids=["cmaes", "gradient"],
)  # fmt: skip
def test_a_search_stopped_by_a_signal_ends_as_if_it_had_run_through(
    run_folder: Path, deme: Callable, words: tuple[str, ...]
) -> None:
    result = stop_after(deme, 4, "merge", *PAIR, *words)
    assert isinstance(result.exception, Stopped), "it was over before the signal came"
    assert result.exception.exit_code == 75
    done = len(tried(JOURNAL))
    assert f"{done} trials are saved in {JOURNAL}; run the same" in str(result.exception)
    assert done >= 4
    assert not MERGED.exists()
    again = deme("merge", *PAIR, *words)
    assert again.exit_code == 0, repr(again.exception)
    assert f"continuing after {done} trials" in again.stderr
    assert deme("merge", *PAIR, *words, "-o", "whole.safetensors").exit_code == 0
    assert tried(JOURNAL) == tried(Path("whole.trials.jsonl"))
    one, other = read_record(MERGED), read_record(Path("whole.safetensors"))
    assert {**one.search, "seconds": 0} == {**other.search, "seconds": 0}
    assert one.fingerprint == other.fingerprint


def test_a_search_stopped_in_its_report_measures_it_again(run_folder: Path, deme: Callable) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", "--num", "32")
    Path("deme.toml").write_text("[merge]\nreport_num = 2000\nreport_repeats = 9\n")
    result = stop_after(deme, 6, *words)  # its six trials, soup included
    assert isinstance(result.exception, Stopped), repr(result.exception)
    assert not MERGED.exists()
    Path("deme.toml").write_text("[merge]\nreport_num = 8\nreport_repeats = 2\n")
    assert deme(*words).exit_code == 0
    assert len(tried(JOURNAL)) == 6
    assert read_record(MERGED).report["protocols"][0]["num"] == 8


@pytest.mark.slow
def test_two_processes_share_a_search_and_end_with_one_file(run_folder: Path) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.3,0.6,1", "--num", "512",
             "--no-report", "--json")  # fmt: skip
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "deme_cli", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert {json.loads(out)["path"] for out, _ in ended} == {str(MERGED)}
    _, _, trials, merged = read_journal(JOURNAL)
    points = [trial.point for trial in trials]
    assert len(set(points)) == len(points) == 16 + 1, "a trial was missed or done twice"
    assert read_record(MERGED).fingerprint == merged
    assert not list(run_folder.glob(".*"))


def test_a_finished_search_is_repeated_by_force_alone_and_another_one_is_refused(
    run_folder: Path, deme: Callable, refuse: Callable
) -> None:
    words = ("merge", *PAIR, "--search", "grid", "--grid", "0,0.5", *FAST)
    assert deme(*words).exit_code == 0
    first, journal = MERGED.read_bytes(), JOURNAL.read_bytes()
    assert "exists; add --force" in str(deme(*words).exception)
    assert (MERGED.read_bytes(), JOURNAL.read_bytes()) == (first, journal)
    assert "continuing" not in deme(*words, "--force").stderr, "all trials are made again"
    MERGED.unlink()
    again = deme(*words)
    assert "continuing after 4 trials" in again.stderr, "the trials are there, the file is not"
    MERGED.unlink()
    for other, differs in (
        (("merge", *PAIR[::-1], *words[3:]), "parents"),
        ((*words, "--seed", "7"), "seed"),
        ((*words, "--num", "17"), "objectives"),
        ((*words, "--method", "ties"), "combination"),
        ((*words, "--coefficients-for", "conv_in.*=1,1"), "fixed"),
    ):
        assert differs in refuse(2, "holds the trials of another search", *other)
    assert deme(*other, "--force").exit_code == 0


def test_what_is_tried_is_shown_while_it_runs_and_when_it_has_ended(
    run_folder: Path, deme: Callable
) -> None:
    stop_after(deme, 4, "merge", *PAIR, *GRID)
    shown = deme("merge", "--show", JOURNAL)
    assert "not finished" in shown.stderr
    assert Path(shown.stdout.strip()).read_bytes().startswith(b"\x89PNG")
    document = json.loads(deme("merge", "--show", JOURNAL, "--json").stdout)
    assert document["finished"] is False
    assert len(document["trials"]) >= 4
    assert document["trials"][0]["name"] == "base"
    assert document["trials"][0]["coefficients"] == {"1of4": 0, "3of4": 0}
    assert document["best"] == min(document["trials"], key=lambda trial: trial["objective"])
    deme("merge", *PAIR, *GRID)
    ended = json.loads(deme("merge", "--show", MERGED, "--json").stdout)
    assert ended["finished"] is True
    assert len(ended["trials"]) == 16 + 1
