"""What the processes of one launch tell each other: flags, sums, and who failed first.

They talk on two planes. Flags, sums of losses and waiting go over gloo between processors, where a
peer that died is noticed at once; gradients go where they lie, over NCCL on GPUs. A store beside
them, held by the launcher or the first process, keeps who failed first: only that one says why, and
all end with its exit code. Which process this is, launch.py knows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ConfigError, DemeError, MissingError, is_out_of_memory
from deme_cli.launch import Launch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_PATIENCE = timedelta(minutes=30)  # imports and downloads before the first word
_WORK = timedelta(hours=12)  # of one process, while others wait; a dead one is told at once
_LEAVE_SECONDS = 5.0  # how long the first process holds the store for the others
_MAX_DIMENSIONS = 8  # of an array that is gathered


class Lost(DemeError):
    """Another process of the launch ended; exits as that one did."""


class World:
    """This process among those it joined. Alone, every method gives back what it got."""

    def __init__(
        self, launch: Launch | None = None, *, store: Any = None, control: Any = None,
        device: str = "",
    ) -> None:  # fmt: skip
        launch = launch or Launch()
        self.rank, self.size = launch.rank, launch.world_size
        self.device = device  # the one that is this process's own; "" alone
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
        """On the first process, the array of each (n_k, ...), in their order; elsewhere nothing.

        All of one dtype. A process that has none gives an empty one, of any shape and dtype.
        """
        if self.is_alone:
            return [array]
        import numpy as np
        import torch
        from torch.distributed import gather

        told = torch.zeros(self.size, 1 + _MAX_DIMENSIONS, dtype=torch.int64)
        told[self.rank, 0] = array.nbytes
        told[self.rank, 1 : 1 + array.ndim] = torch.tensor(array.shape) + 1  # 0: no dimension
        self.add_up(told)
        sizes = told[:, 0].tolist()
        shapes = [[n - 1 for n in row if n] for row in told[:, 1:].tolist()]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own.numpy()[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view("u1")
        parts = [torch.empty_like(own) for _ in sizes] if self.is_first else None
        with _talking():
            gather(own, parts, dst=0, group=self._control)
        return [
            part[:size].numpy().view(array.dtype).reshape(shape)
            for part, size, shape in zip(parts or [], sizes, shapes, strict=False)
        ]

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


def join(launch: Launch, device: str) -> World:
    """Meet the other processes of `launch`, through accelerate; returns when all have come.

    device: `auto`, `cpu` or `cuda`; each process gets the GPU of its number on its machine. Raises
    ConfigError or MissingError on another device, too few GPUs, or where they do not meet.
    """
    global _joined
    if launch.world_size == 1:
        return ALONE
    os.environ.update(launch.variables)  # before torch reads how many threads it may have
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    has_gpu = _has_gpu(launch, device)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
        store.set_timeout(_PATIENCE)
        state = PartialState(
            cpu=not has_gpu,
            backend="cuda:nccl,cpu:gloo" if has_gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
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
    own = torch.device(state.device)
    store = dist.PrefixStore("deme", store)
    _joined = World(launch, store=store, control=control, device=str(own))
    return _joined


def _has_gpu(launch: Launch, device: str) -> bool:
    """Whether the processes work on GPUs. Raises on a device that they cannot share."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {device}: {launch.world_size} processes each take one of their own; use "
            f"--device cuda, cpu or auto"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    num, needed = torch.cuda.device_count(), launch.local_world_size
    if num == 0 or (num < needed and not (launch.binds_gpus and num == 1)):
        raise MissingError(
            f"--device {device}: {needed} processes on this machine, which has {num} CUDA GPUs; "
            f"start one for each GPU"
        )
    return True


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
