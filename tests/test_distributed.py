from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from deme_cli.distributed import (
    ALONE,
    JointStopRequests,
    Lost,
    World,
    meet,
    read_launch,
)
from deme_cli.errors import ConfigError, DemeError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
}  # fmt: skip
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "5", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_CPUS_PER_TASK": "6",
    "SLURM_STEP_NODELIST": "gpu[03-04,9],cpu1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "4",
}  # fmt: skip


def test_a_slurm_step_is_put_into_the_words_of_torch() -> None:
    launch = read_launch(STEP)
    assert (launch.rank, launch.world_size) == (3, 5)
    assert (launch.local_world_size, launch.binds_gpus) == (2, True)
    words = dict(launch.variables)
    assert 15000 <= int(words.pop("MASTER_PORT")) < 30000
    assert words.pop("TORCH_CPP_LOG_LEVEL") == "ERROR"
    assert words == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03", "OMP_NUM_THREADS": "6",
    }  # fmt: skip
    same = [read_launch({**STEP, "SLURM_PROCID": rank}).variables["MASTER_PORT"] for rank in "01"]
    other = read_launch({**STEP, "SLURM_STEP_ID": "3"}).variables["MASTER_PORT"]
    assert same[0] == same[1] != other
    assert read_launch({**STEP, "MASTER_PORT": "1234"}).variables.get("MASTER_PORT") is None
    launch = read_launch({**STEP, **TORCHRUN})  # torchrun within a step
    assert (launch.rank, launch.world_size, launch.local_world_size) == (3, 4, 2)
    assert not launch.binds_gpus


def test_a_process_that_nobody_started_with_others_is_alone() -> None:
    for environ in (
        {},
        BATCH_SCRIPT,
        {**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # salloc's shell
        {**STEP, "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "4"},
    ):
        launch = read_launch(environ)
        assert (launch.rank, launch.world_size, dict(launch.variables)) == (0, 1, {})
        assert meet("auto", environ) is ALONE


def test_the_processes_meet_on_the_first_host() -> None:
    for hosts, first in (
        ("node1,node2", "node1"),
        ("node[03-07,9],other", "node03"),
        ("rack[1-2]node[08-09].cluster,x", "rack1node08.cluster"),
    ):
        launch = read_launch({**STEP, "SLURM_STEP_NODELIST": hosts})
        assert launch.variables["MASTER_ADDR"] == first


def test_an_environment_without_sense_is_refused() -> None:
    for change, word in (
        ({"RANK": "4"}, "expected 0 to 3"),
        ({"RANK": "two"}, "RANK = 'two'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "put WORLD_SIZE=1"),
    ):
        with pytest.raises(ConfigError, match=word):
            read_launch({**TORCHRUN, **change})


def test_processes_share_no_device_of_one_name() -> None:
    with pytest.raises(ConfigError, match="--device cuda:1: 4 processes each take one"):
        meet("cuda:1", {**TORCHRUN, "RANK": "0"})


def test_alone_everything_is_as_it_was() -> None:
    error = DemeError("it failed")
    assert ALONE.fail(error) == (True, 1)
    assert ALONE.largest(7) == 7
    assert ALONE.failure() == 0
    ALONE.require_same({"anything": 1})
    ALONE.leave(has_failed=True)
    requests = JointStopRequests(ALONE)
    requests.exchange()
    assert not requests.is_agreed


def test_a_lack_of_memory_in_talking_is_not_taken_for_a_lost_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text, expected in (
        ("Cuda failure 2 'out of memory'", RuntimeError), ("Connection closed by peer", Lost)
    ):  # fmt: skip

        def refuse(*args: object, text: str = text, **options: object) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr("torch.distributed.all_reduce", refuse)
        with pytest.raises(Exception) as found:  # noqa: PT011  (its type is what is asked)
            World(3, 4).add_up(torch.zeros(1))
        assert type(found.value) is expected


def test_who_is_alone_imports_nothing_for_others() -> None:
    code = (
        "import sys; from deme_cli.distributed import meet\n"
        "meet('auto', {}); print({'torch', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
