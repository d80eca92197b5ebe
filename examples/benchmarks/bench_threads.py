"""How many threads training should take on a CPU, and how they should wait for each other.

    python examples/benchmarks/bench_threads.py [--rounds 5] [--slice 1]

Updates per second of the digits U-Net (batch 64, many small operations) and of
google/ddpm-cifar10-32's shape (35.7 M parameters, batch 4 at 32 x 32, large ones), with the
consistency loss, as `deme finetune` makes them:

    1              one thread
    2 passive      two that sleep while they wait: OMP_WAIT_POLICY=passive
    2 unset        two, the policy left to the OpenMP runtime
    2 spinning     two that spin while they wait: OMP_WAIT_POLICY=active

on an idle machine and beside a process that keeps one core busy. --threads puts another number for
two. Every setting is a process of its own, for the OpenMP runtime reads them once; all but the one
whose turn it is are stopped (SIGSTOP), so that waiting threads take nothing from it. Linux and
macOS only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rounds import in_turn, machine, ratios, spread

MODELS = {"small": 64, "large": 4}  # batch sizes
NAMES = {"small": "digits U-Net, batch 64", "large": "ddpm-cifar10-32, batch 4"}
POLICIES = ("passive", "unset", "active")
Setting = tuple[int, str]


def work(model: str, seconds: float) -> None:
    """Run in a child: stop; once continued, update for `seconds` and print updates per second."""
    import torch
    from random_models import ddpm_cifar10, random_denoiser

    from deme_cli.config import FinetuneConfig
    from deme_cli.data.digits import BASE_PATH
    from deme_cli.diffusion.denoiser import load_denoiser
    from deme_cli.training.objective import expert_losses
    from deme_cli.training.state import TrainingState
    from deme_cli.training.weighting import Reduction

    small = model == "small"
    denoiser = load_denoiser(BASE_PATH) if small else random_denoiser(ddpm_cifar10())
    base, schedule, config = denoiser.network, denoiser.schedule, FinetuneConfig()
    network = copy_of(base)
    state = TrainingState(network, Reduction(config, schedule), config, scale_loss=False)
    x0 = torch.randn(MODELS[model], *denoiser.sample_shape)
    t = torch.randint(0, schedule.num_train_timesteps, (len(x0),))

    def update() -> None:
        losses = expert_losses(
            network, base, schedule, x0=x0, eps=torch.randn_like(x0), t=t, consistency=1.0
        )
        losses.total.mean().backward()
        state.update()

    update()
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            update()
            done += 1
        print(done / (time.perf_counter() - began), flush=True)


def copy_of(network):  # type: ignore[no-untyped-def]  # torch is the children's
    import copy

    return copy.deepcopy(network).train().requires_grad_(True)


@contextmanager
def stopped(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child that has come to its first stop; killed in the end."""
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_stop(child)
        yield child
    finally:
        child.kill()
        child.wait()


def wait_for_stop(child: subprocess.Popen[str]) -> None:
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit("a benchmark process has ended early")


def one_slice(child: subprocess.Popen[str]) -> float:
    """Let a stopped child do one slice of its work; returns its updates per second."""
    child.send_signal(signal.SIGCONT)
    assert child.stdout is not None
    rate = float(child.stdout.readline())
    wait_for_stop(child)
    return rate


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """While entered, another process wants a core."""
    if not is_busy:
        yield
        return
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        rival.kill()
        rival.wait()


def environment_of(setting: Setting) -> dict[str, str]:
    threads, policy = setting
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    chosen = {} if policy == "unset" else {"OMP_WAIT_POLICY": policy}
    return {**kept, **chosen, "OMP_NUM_THREADS": str(threads)}


def measure(model: str, settings: list[Setting], rounds: int, seconds: float) -> dict:
    """Updates per second of every setting, alone (False) and beside a busy process (True)."""
    words = [sys.executable, __file__, "--child", model, "--slice", str(seconds)]
    found: dict = {(setting, rival): [] for setting in settings for rival in (False, True)}
    with ExitStack() as stack:
        children = {
            setting: stack.enter_context(stopped(words, environment_of(setting)))
            for setting in settings
        }
        names = list(found)
        for counts, index in in_turn([str(i) for i in range(len(names))], rounds):
            setting, rival = names[int(index)]
            with busy(rival):
                rate = one_slice(children[setting])
            if counts:
                found[setting, rival].append(rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=float, default=1.0, help="seconds of each turn, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(options.child, options.slice)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stopped children are still killed
    began = time.perf_counter()
    print(machine())
    settings: list[Setting] = [(1, "passive"), *((options.threads, p) for p in POLICIES)]
    for model in MODELS if options.model == "both" else [options.model]:
        found = measure(model, settings, options.rounds, options.slice)
        print(f"\n{NAMES[model]}: updates/s, and relative to one thread in the same round\n")
        print("| threads | alone | relative | beside a busy process | relative |")
        print("|---|---|---|---|---|")
        for setting in settings:
            cells = []
            for rival in (False, True):
                rates = found[setting, rival]
                cells += [spread(rates), spread(ratios(rates, found[settings[0], rival]))]
            print(f"| {setting[0]} {setting[1]} | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
