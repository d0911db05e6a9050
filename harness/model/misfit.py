"""Where a run fails because the widths in a model's config do not fit together, the request is refused, not the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.config.settings import Refusal, Settings
from harness.model import init_weights
from harness.model.loader import count, model_config, quiet
from harness.model.narrow import first_line, small

LARGEST = 100_000_000
"""Parameters of the largest model that is made to see what its widths come to."""


@contextmanager
def misfits(settings: Settings) -> Iterator[None]:
    """Within it a run's failure is a refusal where the widths of the model's config do not fit together.

    That is seen where a forward of a few such layers fails in the same way by itself, and not looked at where those are
    too large to be made.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        alone = _failure(settings)
        if type(alone) is not type(error):
            raise
        given = settings.model
        key, value = ("model.path", given.path) if given.path else ("model.config", given.name)
        remedy = f"its widths do not fit together ({first_line(error)}); give others"
        raise Refusal(key, value, remedy) from error


def _failure(settings: Settings) -> Exception | None:
    """What a forward of a few layers of the model comes to."""
    config = small(model_config(settings.model), {}, cut=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet():
        made = init_weights.outline(config, getattr(torch, settings.dtype), settings.model.attention)
        if count(made) > LARGEST:
            return None
        init_weights.make(made, list(init_weights.modules(made)), made, torch.device("cpu"), seed=0)
        try:
            made.eval()(input_ids=torch.ones(2, 8, dtype=torch.int64), use_cache=False)
        except Exception as error:  # the model's own code
            return error
    return None
