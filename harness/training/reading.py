"""Batches as a run reads them: what is read is in the ledger's traffic, and what counts in them is known."""

from collections.abc import Callable, Iterator
from itertools import islice

from harness.config.load import Refusal, Settings
from harness.data import token_batches
from harness.data.batch import Batch, Share
from harness.ledger import Ledger
from harness.ledger.traffic import READ
from harness.runtime.world import World


class Reported:
    """`batches`, whose tokens and labels are read from the stored rows as they are asked for: each is 4 bytes there.

    Padding counts with them: a rehearsal does not know the lengths. `shares` has those of the step's batches.
    """

    def __init__(self, batches: Iterator[Batch], ledger: Ledger) -> None:
        self.batches, self.ledger = batches, ledger
        self.shares: list[Share] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        stored = (tensor for name, tensor in batch.tensors.items() if name != "mask")
        self.ledger.traffic.report(
            READ, {"tokens": sum(token_batches.STORED_BYTES * each.numel() for each in stored)}
        )
        if batch.share is not None:
            self.shares.append(batch.share)
        return batch


def validation_batches(
    settings: Settings, world: World, ledger: Ledger, corpus: token_batches.Corpus
) -> Callable[[], Iterator[Batch]] | None:
    """A function that returns the validation batches, the same ones at each call; None where validation is off."""
    train, blocks = settings.train, corpus.validation
    if not train.validate_every or blocks is None:
        return None
    if isinstance(blocks, token_batches.Blocks) and len(blocks) < train.micro_batch * world.dp_size:
        raise Refusal(
            "data.validation",
            settings.data.validation,
            f"it holds out {len(blocks)} sequences, and {world.dp_size} ranks validate {train.micro_batch} each at "
            "once; raise it, or use train.validate_every=0",
        )

    def batches() -> Iterator[Batch]:
        number = train.validation_batches
        stream = token_batches.loader(blocks, train.micro_batch, world, settings.seed, accumulation=number)
        return (batch.to(world.device) for batch in Reported(islice(stream, number), ledger))

    return batches
