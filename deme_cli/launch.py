"""Which process of how many this is, as the environment tells; needs no torch.

`torchrun`, `accelerate launch` and `srun` start one command line several times. Who a process is
stands in RANK and WORLD_SIZE, or in SLURM's variables of a job *step*. Those of a job do not count:
a plain `deme` in a batch script of many tasks runs once and waits for nobody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from deme_cli.errors import ConfigError

_NO_STEP = 0xFFFFFFF0  # SLURM numbers batch scripts and interactive shells from here


@dataclass(frozen=True, slots=True)
class Launch:
    """Process `rank` of `world_size`, `local_rank` of `local_world_size` on its machine.

    `variables` is what torch and accelerate read of it. binds_gpus: whether the launcher may show
    each process a GPU of its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    binds_gpus: bool = False


def read_launch(environ: Mapping[str, str]) -> Launch:
    """What the environment says of this process; raises ConfigError where it makes no sense."""
    variables = dict(environ)
    is_step = "WORLD_SIZE" not in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1
    if is_step and _number(environ, "SLURM_STEP_ID", 0) < _NO_STEP:
        variables |= _torch_variables(environ)
    elif "RANK" not in environ or _number(environ, "WORLD_SIZE", 1) == 1:
        return Launch()
    rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK = {rank} of WORLD_SIZE = {size}: expected 0 to {size - 1}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise ConfigError(
                f"{name} is not set, by which {size} processes would meet; start them with "
                f"torchrun, accelerate launch or srun, or put WORLD_SIZE=1 before `deme`"
            )
    local = _number(variables, "LOCAL_RANK", 0), _number(variables, "LOCAL_WORLD_SIZE", 1)
    variables["LOCAL_RANK"] = str(local[0])  # accelerate asks for it
    variables.setdefault("OMP_NUM_THREADS", str(_num_threads(environ, local[1])))
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack trace where a peer has gone
    changed = {name: text for name, text in variables.items() if environ.get(name) != text}
    return Launch(rank, size, *local, variables=changed, binds_gpus=is_step)


def _torch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A SLURM job step in torch's words. The port is the same in all tasks of the step."""
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    found = {
        "RANK": environ.get("SLURM_PROCID", ""),
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environ)),
        "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(15000 + (job * 31 + step) % 15000),  # below the ports given to clients
    }
    given = ("MASTER_ADDR", "MASTER_PORT")
    return found | {name: environ[name] for name in given if environ.get(name)}


def first_host(hosts: str) -> str:
    """The first of SLURM's `node[03-07,9],other`: `node03`."""
    whole = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", whole.group() if whole else hosts)


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of `2(x3),1` by the node's number."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _num_threads(environ: Mapping[str, str], local_world_size: int) -> int:
    """Threads for each process: what SLURM gives a task, else this machine's cores divided."""
    if threads := _number(environ, "SLURM_CPUS_PER_TASK", 0):
        return threads
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    return max(1, cores // max(local_world_size, 1))


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r} in the environment: expected a number") from None
