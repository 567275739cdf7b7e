"""What unvanish bears: very long sequences, many steps, many layers, many parameters. One figure per line.

python benchmarks/load.py [long|diagnosis|steps|layers|parameters]
"""

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import unvanish as uv


def peak() -> float:
    """GiB this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held() -> float:
    """MiB this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def long() -> None:
    """One watched training step over a million steps."""
    T, H = 1_000_000, 128
    lstm, x = uv.nn.LSTM(4, H), torch.randn(T, 1, 4)
    lstm.checkpoint_every = 1000
    optimizer = torch.optim.SGD(lstm.parameters(), 1e-3)
    start = time.perf_counter()
    with uv.watch(lstm) as flow:
        lstm(x)[0][-1].square().sum().backward()
    optimizer.step()
    record = flow["l0"]
    assert record.dh.shape == (T, 1)
    print(
        f"T={T:,}, B=1, H={H}: {time.perf_counter() - start:.0f} s, {peak():.2f} GiB at most, "
        f"residual {record.residual:.0e}"
    )


class Last(nn.Module):
    """An LSTM and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 64, batch_first=True), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def diagnosis() -> None:
    """A diagnosis of 16 sequences of 16,000 steps, without interventions."""
    x, y = torch.randn(16, 16_000, 4), torch.randint(2, (16,))
    start = time.perf_counter()
    found = uv.diagnose(Last(), x, y, loss=nn.functional.cross_entropy, budget=0)
    print(f"T=16,000, B=16, H=64: diagnosis {time.perf_counter() - start:.1f} s, {peak():.2f} GiB")
    assert found.layers


def steps() -> None:
    """Ten thousand watched training steps: what the process holds after each thousandth."""
    for family in (uv.nn.LSTM, nn.LSTM):
        model, x = family(4, 32), torch.randn(20, 8, 4)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        sizes = []
        with uv.watch(model) as flow:
            for step in range(10_000):
                optimizer.zero_grad()
                model(x)[0][-1].square().mean().backward()
                optimizer.step()
                if step % 1000 == 999:
                    sizes.append(held())
        assert flow["l0"].step == 10_000
        print(
            f"{family.__module__}.{family.__name__}: MiB after 1,000, 2,000, …: {', '.join(f'{s:.1f}' for s in sizes)}"
        )


def layers() -> None:
    """64 recurrent layers in one model, watched."""
    model, x = uv.nn.LSTM(16, 32, num_layers=64), torch.randn(50, 8, 16)
    uv.cures.forget_bias_(model, 2.0)
    start = time.perf_counter()
    with uv.watch(model) as flow:
        model(x)[0][-1].square().sum().backward()
    seconds, residual = time.perf_counter() - start, max(record.residual for record in flow.layers.values())
    print(f"{len(flow.layers)} layers: {seconds:.1f} s, {peak():.2f} GiB, residual {residual:.0e}")


def parameters() -> None:
    """A model with 200 million parameters, watched."""
    embedding, lstm = nn.Embedding(100_000, 1500), uv.nn.LSTM(1500, 2048, num_layers=2, batch_first=True)
    head = nn.Linear(2048, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm, self.head = embedding, lstm, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embedding(x))[0][:, -1])

    model, x = Model(), torch.randint(100_000, (8, 30))
    count = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    with uv.watch(model) as flow:
        model(x).square().sum().backward()
    seconds, residual = time.perf_counter() - start, max(record.residual for record in flow.layers.values())
    print(f"{count / 1e6:.0f} M parameters: watched step {seconds:.1f} s, {peak():.2f} GiB, residual {residual:.0e}")


MEASURED: dict[str, Callable[[], None]] = {
    "long": long,
    "diagnosis": diagnosis,
    "steps": steps,
    "layers": layers,
    "parameters": parameters,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or MEASURED:
        MEASURED[name]()
