"""The product, where rank 1 alone refuses while the others wait for it to make the model."""

import os
from typing import NoReturn

from harness.__main__ import console
from harness.config.settings import Refusal
from harness.model import loader

if os.environ["RANK"] == "1":

    def build(*_: object) -> NoReturn:
        raise Refusal("model.path", "mine", "it is corrupt here; give a complete one")

    loader.build = build  # type: ignore[assignment]

console()
