"""Loops: optimizers, data, processes, threads and profilers."""

import asyncio
import os
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness import Ledger
from tests.programs import PROGRAMS, data, gradients, mlp, program, train


@program
def scaled_and_accumulated(ledger: Ledger) -> Any:
    model, scaler = mlp(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger.own(model=model, optimizer=optimizer)
    for _ in range(2):
        for seed in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                lost = model(data(seed=seed)).float().pow(2).mean() / 2
            scaler.scale(lost).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)
    return [parameter.detach() for parameter in model.parameters()], scaler.get_scale()


@program
def lbfgs(ledger: Ledger) -> Any:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    ledger.own(model=model, optimizer=optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        lost: Tensor = model(data()).pow(2).mean()
        lost.backward()
        return lost

    return [optimizer.step(closure) for _ in range(2)]


@program
def fused_and_foreach(ledger: Ledger) -> Any:
    one, other = mlp(), mlp()
    fused = torch.optim.AdamW(one.parameters(), fused=True)
    each = torch.optim.AdamW(other.parameters(), foreach=True)
    return train(ledger, one, optimizer=fused), train(ledger, other, optimizer=each)


@program
def parameters_that_come_later(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model[-1].parameters()})
    ledger.own(optimizer=optimizer)
    for _ in range(2):
        model(data()).sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((16,), float(index)) * 2


@program
def loaded_by_workers(ledger: Ledger) -> Any:
    loader = DataLoader(Rows(), 4, num_workers=1, multiprocessing_context="fork")
    model = mlp()
    ledger.own(model=model)
    return [model(rows).detach() for rows in loader]


@program
def forked(ledger: Ledger) -> Any:
    rows = data()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, str((rows * 2).sum().item()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(read, 100)


@program
def asynchronous(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)

    async def run() -> list[Tensor]:
        result = []
        for _ in range(2):
            model(data()).sum().backward()
            await asyncio.sleep(0)
            result += [*gradients(model)]
        return result  # type: ignore[return-value]

    return asyncio.run(run())


@program
def in_threads(ledger: Ledger) -> Any:
    result: list[Any] = []
    threads = [
        threading.Thread(target=lambda: result.append(train(Ledger(mode="off"), mlp())), name="loop"),
        threading.Thread(target=lambda: result.append(torch.ones(1000) * 2), name="raw"),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    return result


def profiled(ledger: Ledger) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        result = train(ledger, mlp())
    return result, {event.key for event in run.key_averages() if event.key.startswith("aten::")}


PROGRAMS["profiled"] = profiled
