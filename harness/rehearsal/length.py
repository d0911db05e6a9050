"""How long a rehearsal of training may be: it computes every micro-batch of the steps that the ledger records."""

from harness.config.settings import Refusal, Settings

MOST = 1024
"""The most micro-batches that a rank computes. The smallest model takes about 65 ms of a core for each."""


def check(settings: Settings) -> None:
    """Raise Refusal where a rank would compute more than `MOST` micro-batches."""
    if settings.mode != "train":
        return
    train = settings.train
    steps = min(train.steps, settings.ledger.steps)
    every = train.validate_every
    last = steps == train.steps and bool(steps % (every or 1))  # it is validated too
    validations = steps // every + last if every else 0
    trained, validated = steps * train.accumulation, validations * train.validation_batches
    if trained + validated <= MOST:
        return
    key, value, fewer = "ledger.steps", settings.ledger.steps, 2
    if steps <= 2 or trained + validated > steps * MOST // 2:
        key, value, fewer = "train.accumulation", train.accumulation, max(1, MOST // 2 // steps)
        if validated > trained:
            key, value = "train.validation_batches", train.validation_batches
    problem = f"a rehearsal would compute {trained + validated:,} micro-batches, and takes {MOST}"
    raise Refusal(key, value, f"{problem}; use {key}={fewer}: further ones repeat what those before them did")
