"""What torch's compiler raises where it cannot compile."""

import torch


def not_compiled() -> tuple[type[Exception], ...]:
    """The errors of a program that is not compiled. Their modules take time to import."""
    return (
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.exc.FailOnRecompileLimitHit,
        torch._inductor.exc.InductorError,
    )
