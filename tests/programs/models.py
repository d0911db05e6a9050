"""What is done with a model besides running it: copies, files, conversions, graphs."""

import copy
import io
import pickle
import tempfile
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from harness import Ledger
from tests.programs import data, gradients, mlp, program, train


@program
def copies_and_files(ledger: Ledger) -> Any:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    ledger.own(model=model, optimizer=optimizer)
    model(data()).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    read = torch.load(file)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), mlp()]
    others[2].load_state_dict(read["model"], assign=True)
    for other in others:
        other.zero_grad()
        other(data()).sum().backward()
    optimizer.load_state_dict(read["optimizer"])
    return [gradients(other) for other in others], len(copy.deepcopy(optimizer).state)


@program
def weights_mapped_from_a_file(ledger: Ledger) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        torch.save(mlp().state_dict(), f"{directory}/weights.pt")
        model = mlp()
        model.load_state_dict(torch.load(f"{directory}/weights.pt", mmap=True), assign=True)
        ledger.own(model=model)
        return model(data()).detach()


@program
def converted(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    model(data()).sum().backward()
    model.double().float().requires_grad_(False).to("meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model(data())


@program
def lazy(ledger: Ledger) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    ledger.own(model=model)
    model(data()).sum().backward()
    return gradients(model)


@program
def parametrized(ledger: Ledger) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), nn.Linear(4, 4))
    return train(ledger, model)


@program
def graphs_of_it(ledger: Ledger) -> Any:
    model = mlp()
    ledger.own(model=model)
    traced = make_fx(lambda rows: model(rows).sum())(data())
    symbolic = make_fx(lambda rows: rows.sin().sum(), tracing_mode="symbolic")(data())
    return torch.fx.symbolic_trace(model).code, traced.code, symbolic.code


@program
def scripted(ledger: Ledger) -> Any:
    model, written = mlp(), torch.jit.script(mlp())
    ledger.own(model=model)
    written(data()).sum().backward()
    return torch.jit.trace(model, data())(data(5)), [written(data()) for _ in range(3)], gradients(written)


@program
def fake_and_meta(ledger: Ledger) -> Any:
    with torch._subclasses.FakeTensorMode():
        model = nn.Linear(1000, 1000)
        ledger.own(model=model)
        shape = model(torch.ones(1000, 1000)).shape
    return [*shape], mlp().to("meta")(torch.ones(2, 16, device="meta")).shape[0], data().sum()
