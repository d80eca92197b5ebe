"""Where the compiler fails on a network: plain calls or one line, and never another's error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deme_cli.diffusion import execution
from deme_cli.diffusion.execution import compile_calls, uncompiled
from deme_cli.errors import ConfigError

Compiler = Callable[[nn.Module, list[Tensor]], Callable]
WARNING = "the compiler fails on this network"


class Network(nn.Module):
    """x -> tanh(W x), which has memory for four rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x).tanh()
        require_memory(len(x))
        return output


@torch.compiler.disable  # as a kernel's, it is seen when it runs
def require_memory(num: int) -> None:
    if num > 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and no warning given."""
    torch.compiler.reset()
    execution._warn.cache_clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiler], None]:
    """Have networks compiled by another compiler than torch's."""

    def use(backend: Compiler) -> None:
        def compile(network: nn.Module) -> None:
            network._compiled_call_impl = torch.compile(network._call_impl, backend=backend)

        monkeypatch.setattr(nn.Module, "compile", compile)

    return use


def refuse(graph: nn.Module, inputs: list[Tensor]) -> Callable:
    raise NotImplementedError("no kernel for tanh\nof this size")


def test_auto_goes_on_uncompiled_after_one_warning(
    compiler: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(refuse)
    networks = [Network(), Network()]
    x = torch.randn(4, 3)
    wanted = networks[0](x)
    for network in networks:
        compile_calls(network, "auto")
        for _ in range(2):
            assert torch.equal(network(x), wanted)
    assert " ".join(capsys.readouterr().err.split()) == (
        f"warning: {WARNING} (no kernel for tanh): it goes on uncompiled"
    )


def test_on_says_what_failed_and_what_to_do(compiler: Callable) -> None:
    compiler(refuse)
    network = Network()
    compile_calls(network, "on")
    with pytest.raises(ConfigError, match=r"--compile on: .*\(no kernel for tanh\); use .* off"):
        network(torch.randn(4, 3))


@pytest.mark.parametrize(("how", "works"), [("auto", True), ("on", False)])
def test_what_is_wrong_with_a_call_is_told_as_if_it_were_not_compiled(
    compiler: Callable, capsys: pytest.CaptureFixture[str], how: str, works: bool
) -> None:
    compiler((lambda graph, inputs: graph.forward) if works else refuse)
    network = Network()
    compile_calls(network, how)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as shapes:
        network(torch.randn(4, 5))
    assert type(shapes.value) is RuntimeError
    with pytest.raises(torch.OutOfMemoryError):
        network(torch.randn(5, 3))
    assert WARNING not in capsys.readouterr().err
    if works:
        network(torch.randn(4, 3))
        assert network._compiled_call_impl is not None


def test_a_network_that_fails_at_a_later_shape_goes_on_uncompiled(
    compiler: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def once(graph: nn.Module, inputs: list[Tensor]) -> Callable:
        seen.append(len(inputs))
        return graph.forward if len(seen) <= 1 else refuse(graph, inputs)

    compiler(once)
    network = nn.Linear(3, 2)
    compile_calls(network, "auto")
    for num in (4, 2, 3):
        x = torch.randn(num, 3)
        found = network(x)
        with uncompiled(network):
            assert torch.equal(found, network(x))
    assert len(seen) == 2
    assert capsys.readouterr().err.count(WARNING) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_backward_pass_that_cannot_be_compiled_is_found_by_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor.graph import GraphLowering

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = GraphLowering.run

    def forward_alone(self: GraphLowering, *args: object) -> object:
        if self.is_backward:
            raise NotImplementedError("no kernel backwards")
        return run(self, *args)

    monkeypatch.setattr(GraphLowering, "run", forward_alone)
    network, x = nn.Linear(3, 2), torch.randn(4, 3)
    network(x).square().sum().backward()
    wanted = network.weight.grad
    network.weight.grad = None
    compile_calls(network, "auto")
    network(x).square().sum().backward()
    assert torch.equal(network.weight.grad, wanted)
    assert "no kernel backwards" in capsys.readouterr().err
