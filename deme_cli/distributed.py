"""The processes of one launch: which of them this is, and what they tell each other.

`torchrun`, `accelerate launch` and `srun` start one command line several times. Who a process is
stands in RANK and WORLD_SIZE, or in SLURM's variables of a job *step*. Those of a job do not count:
a plain `deme` in a batch script of many tasks runs once and waits for nobody.

Processes talk on two planes. Flags, sums of losses and waiting go over gloo between processors,
where a peer that died is noticed at once; gradients go where they lie, over NCCL on GPUs. A store
beside them, held by the launcher or the first process, keeps who failed first: only that one says
why, and all end with its exit code.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import ConfigError, DemeError, MissingError, is_out_of_memory
from deme_cli.jobs import StopRequests

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_NO_STEP = 0xFFFFFFF0  # SLURM numbers batch scripts and interactive shells from here


@dataclass(frozen=True, slots=True)
class Launch:
    """Process `rank` of `world_size`, of which `local_world_size` are on its machine.

    `variables` is what torch and accelerate read of it. binds_gpus: whether the launcher may show
    each process a GPU of its own.
    """

    rank: int = 0
    world_size: int = 1
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
    local = max(_number(variables, "LOCAL_WORLD_SIZE", 1), 1)
    variables.setdefault("LOCAL_RANK", "0")  # accelerate asks for it
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    threads = _number(environ, "SLURM_CPUS_PER_TASK", max(1, cores // local))
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack trace where a peer has gone
    changed = {name: text for name, text in variables.items() if environ.get(name) != text}
    return Launch(rank, size, local, changed, is_step)


def _torch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A SLURM job step in torch's words. The port is the same in all tasks of the step."""
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    hosts = environ.get("SLURM_STEP_NODELIST", "localhost")  # as node[03-07,9],other
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    counts: list[int] = []  # of tasks on each node, written 2(x3),1
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    found = {
        "RANK": environ.get("SLURM_PROCID", ""),
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(counts[node] if node < len(counts) else 1),
        "MASTER_ADDR": re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else hosts),
        "MASTER_PORT": str(15000 + (job * 31 + step) % 15000),  # below the ports given to clients
    }
    given = ("MASTER_ADDR", "MASTER_PORT")
    return found | {name: environ[name] for name in given if environ.get(name)}


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r} in the environment: expected a number") from None


_PATIENCE = timedelta(minutes=30)  # imports and downloads before the first word
_WORK = timedelta(hours=12)  # of one process, while others wait; a dead one is told at once
_LEAVE_SECONDS = 5.0  # how long the first process holds the store for the others


class Lost(DemeError):
    """Another process of the launch ended; exits as that one did."""


@contextmanager
def _talking() -> Iterator[None]:
    """Translate what torch says when a process that is talked to has gone.

    A lack of memory is this process's own, for NCCL allocates on the GPU: it passes.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise Lost(
            "another process of this launch ended without a word (killed, or out of memory?); run "
            "the same command again to continue from the last checkpoint"
        ) from error


class World:
    """This process among those it joined. Alone, every method gives back what it got.

    device: the one that is this process's own; "" alone.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, control: Any = None, device: str = ""
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store, self._control = store, control  # the group of all that lies on processors
        self._num_compared = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. All of them have to ask, and wait for it."""
        if self.is_alone:
            return number
        import torch
        from torch.distributed import ReduceOp, all_reduce

        found = torch.tensor(number)
        with _talking():
            all_reduce(found, op=ReduceOp.MAX, group=self._control)
        return int(found)

    def wait(self) -> None:
        """Go on when every process is here. Raises Lost where one has ended."""
        self.largest(0)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Entered by the first process alone, then by the others together."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def add_up(self, tensor: Tensor) -> None:
        """Make `tensor` the sum of the processes' tensors, in place, on the device it lies on."""
        if self.is_alone:
            return
        from torch.distributed import all_reduce

        with _talking():
            all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """On the first process, the array of each, in their order; elsewhere nothing."""
        if self.is_alone:
            return [array]
        import numpy as np
        import torch
        from torch.distributed import gather

        stream = io.BytesIO()
        np.save(stream, array)  # torch's gather_object would unpickle what comes over the network
        own = torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.add_up(sizes)
        own = torch.nn.functional.pad(own, (0, int(sizes.max()) - len(own)))
        parts = [torch.empty_like(own) for _ in sizes] if self.is_first else None
        with _talking():
            gather(own, parts, dst=0, group=self._control)
        return [np.load(io.BytesIO(part.numpy().data)) for part in parts or []]

    def require_same(self, document: Mapping[str, Any]) -> None:
        """Check that all processes are about the same; raises ConfigError naming what differs."""
        if self.is_alone:
            return
        self._num_compared += 1
        key, own = f"same/{self._num_compared}", json.loads(json.dumps(document))
        with _talking():
            if self.is_first:
                self._store.set(key, json.dumps(own))
            self.wait()  # `get` would not notice that the first one has ended
            first = json.loads(self._store.get(key))
        for name in own:
            if own[name] != first.get(name):
                raise ConfigError(
                    f"process {self.rank} has {name} = {own[name]!r}, the first one "
                    f"{first.get(name)!r}: the processes of a launch work on one thing in one "
                    f"folder; to run each on its own, put WORLD_SIZE=1 before `deme`"
                )

    def failure(self) -> int:
        """The exit code of another process that ended by an error, or 0. Asks without waiting."""
        if self.is_alone:
            return 0
        try:
            return int(self._store.get("code")) if self._store.check(["code"]) else 0
        except RuntimeError:  # the process that held the store
            return DemeError.exit_code

    def fail(self, error: DemeError) -> tuple[bool, int]:
        """Whether this process is the one to say why, and the exit code of all."""
        if self.is_alone:
            return True, error.exit_code
        try:
            code = self._store.compare_set("code", "", str(error.exit_code))
            return self._store.add("said", 1) == 1, int(code)
        except RuntimeError:  # the process that held the store: killed, if nobody heard why
            return self.rank == 1 and error.exit_code == DemeError.exit_code, error.exit_code

    def leave(self, *, has_failed: bool) -> None:
        """Let go of the others: at once after an error, so that those who wait are told."""
        if self.is_alone:
            return
        from torch.distributed import destroy_process_group

        try:
            if has_failed:
                self._store.compare_set("code", "", "1")  # of a bug; its traceback says enough
                self._store.add("said", 1)
                group, self._control = self._control, None
                destroy_process_group(group)
                del group  # its connections close when nobody holds it
            self._store.add("left", 1)
            end = time.monotonic() + _LEAVE_SECONDS
            while self.is_first and time.monotonic() < end:
                if self._store.add("left", 0) >= self.size:
                    break
                time.sleep(0.02)
            if not has_failed:
                destroy_process_group()
        except RuntimeError:  # nobody is there any more to be told
            pass


ALONE = World()
_joined = ALONE


def joined() -> World:
    """The processes that this one has joined."""
    return _joined


def meet(device: str, environ: Mapping[str, str] = os.environ) -> World:
    """Join the other processes of this launch, if there are any, through accelerate; returns when
    all have come. The first speaks for all.

    device: `auto`, `cpu` or `cuda`; each process gets the GPU of its number on its machine. Raises
    ConfigError or MissingError on another device, too few GPUs, or where they do not meet.
    """
    global _joined
    launch = read_launch(environ)
    if launch.world_size == 1:
        return ALONE
    if launch.rank > 0:
        console.mute()
    else:
        console.note(f"{launch.world_size} processes work together; waiting for all to come")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {device}: {launch.world_size} processes each take one of their own; use "
            f"--device cuda, cpu or auto"
        )
    os.environ.update(launch.variables)  # before torch reads how many threads it may have
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    num, needed = torch.cuda.device_count(), launch.local_world_size
    has_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if has_gpu and num < needed and not (launch.binds_gpus and num == 1):
        raise MissingError(
            f"--device {device}: {needed} processes on this machine, which has {num} CUDA GPUs; "
            f"start one for each GPU"
        )
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
        store.set_timeout(_PATIENCE)
        backend = "cuda:nccl,cpu:gloo" if has_gpu else "gloo"
        state = PartialState(
            cpu=not has_gpu, backend=backend, store=dist.PrefixStore("group", store), rank=rank,
            world_size=size, timeout=_PATIENCE,
        )  # fmt: skip
        # of its own, for modules of torch hold on to the default group, whose connections then
        # outlive it, and a process that fails would not be noticed before it ends
        control = dist.new_group(backend="gloo", timeout=_WORK)
    except RuntimeError as error:
        meeting = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).strip().splitlines()[0]
        raise MissingError(
            f"process {launch.rank} of {launch.world_size} did not meet the others at {meeting}: "
            f"{reason}; check that all were started, and MASTER_ADDR and MASTER_PORT"
        ) from error
    store = dist.PrefixStore("deme", store)
    _joined = World(launch.rank, launch.world_size, store, control, str(state.device))
    return _joined


def start_others(count: int) -> None:
    """Make of this process the first of a launch of `count` on this machine, all with its command
    line, and start the others. Raises ConfigError where it is of a launch."""
    if (size := read_launch(os.environ).world_size) > 1:
        raise ConfigError(f"--jobs {count}: this is one of {size} processes already; leave it out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    pairs = zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
    own = [word for last, word in pairs if last != "--jobs" and word.split("=")[0] != "--jobs"]
    for rank in range(1, count):
        subprocess.Popen(
            [sys.executable, "-m", "deme_cli", *own], stdout=subprocess.DEVNULL,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )  # fmt: skip


def only_first() -> None:
    """Go on in the first process of this launch, which is alone from here on; end the others, well
    and without a word. Raises what `read_launch` raises."""
    launch = read_launch(os.environ)
    if launch.rank > 0:
        raise SystemExit(0)
    if launch.world_size > 1:
        os.environ["WORLD_SIZE"] = "1"  # nor does a command that this one runs look for the others


_SAME_SIGNAL_SECONDS = 10.0  # a launcher passes on what its processes may have got themselves


class JointStopRequests(StopRequests):
    """Stop requests of all processes: one that is asked to stop stops all, at the same place.

    Of several processes, signals that come again soon are the launcher's echo of the first.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world, self._agreed, self._first_at = world, 0, 0.0

    def exchange(self) -> None:
        """Tell the others whether this process was asked, and hear of them."""
        self._agreed = self._world.largest(int(self.asked or 0))

    @property
    def is_agreed(self) -> bool:
        """Whether to stop: as of the last exchange; alone, as of now."""
        if self._world.is_alone:
            return self.asked is not None
        if self._agreed:
            self.asked = signal.Signals(self._agreed)
        return self._agreed > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._world.is_alone:
            super()._ask(number, frame)
            return
        if self.asked is None:
            self.asked, self._first_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first_at > _SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)
