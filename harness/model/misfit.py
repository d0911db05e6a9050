"""If a run fails because the widths in the model's config do not fit together, report that as a Refusal."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.config.errors import first_line, ours
from harness.config.settings import Refusal
from harness.model import init_weights
from harness.model.loader import count, quiet
from harness.model.narrow import small
from harness.model.plan import Plan

LARGEST = 100_000_000
"""Parameters of the largest model that is built for this check."""


@contextmanager
def misfits(plan: Plan) -> Iterator[None]:
    """A context in which an error becomes a Refusal if the widths in the model's config do not fit together.

    To decide that, a model with a few such layers is built on the CPU: its forward must fail with the same type of
    error. Models whose few layers are too large are not checked.
    """
    try:
        yield
    except (Refusal, OSError):
        raise
    except Exception as error:
        if ours(error):
            raise
        small_error = _failure(plan)
        if type(small_error) is not type(error):
            raise
        model = plan.settings.model
        key, value = ("model.path", model.path) if model.path else ("model.config", model.name)
        remedy = f"its widths do not fit together ({first_line(error, named=True)}); give others"
        raise Refusal(key, value, remedy) from error


def _failure(plan: Plan) -> Exception | None:
    """The error of a forward of a few layers of the model; None if it succeeds, is too large or cannot be built."""
    settings = plan.settings
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet():
        try:
            config = small(plan.config, {}, cut=True)
            model = init_weights.outline(config, getattr(torch, settings.dtype), settings.model.attention)
            if count(model) > LARGEST:
                return None
            init_weights.make(model, list(init_weights.modules(model)), model, torch.device("cpu"), seed=0)
        except Exception:  # it must not hide the error of the run
            return None
        try:
            model.eval()(input_ids=torch.ones(2, 8, dtype=torch.int64), use_cache=False)
        except Exception as error:  # the model's own code may raise any type
            return error
    return None
