"""The fields of `generation`."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.config.fields.kinds import STRICT, Count, NotNegative, Place, Temperature, Tokens

NEW_TOKENS = 64
"""The default limit of tokens generated for a prompt."""


@dataclass(frozen=True, config=STRICT)
class Generation:
    batch: Count = 4
    """Prompts a rank generates from at once."""
    prompts: Place | None = None
    """File of prompts, one a line."""
    prompt: list[str] = Field(default_factory=list)
    """Prompts, as ['first one','second one']."""
    count: Count = 8
    """Prompts sampled from the data where none are given."""
    prompt_length: Tokens = 64
    """Tokens of a sampled prompt."""
    max_new_tokens: Tokens | None = None
    """Most tokens generated for a prompt; null is what the checkpoint says, else 64."""
    cache: Literal["dynamic", "static", "paged", "quantized", "offloaded", "none"] = "dynamic"
    """KV cache; none recomputes everything."""
    cache_bits: Literal[8, 4, 2] = 8
    """cache=quantized: bits of an element; 4 and 2 by optimum-quanto."""
    batching: Literal["static", "continuous"] = "static"
    """Continuous: a finished prompt gives its place to the next; static: a batch waits for its longest."""
    page_size: Annotated[int, Field(ge=4, lt=2**31)] = 16
    """cache=paged: tokens in a page."""
    pages: Tokens | None = None
    """cache=paged: pages of all layers; null is enough for the longest request in every place."""
    batch_tokens: Tokens | None = None
    """batching=continuous: most tokens in a forward; null is the longest prompt, or about 512 at once."""
    workload: Place | None = None
    """File of requests, a JSON object a line: a prompt or its prompt_length, and its own max_new_tokens."""
    lengths: Literal["fixed", "uniform", "skewed"] = "fixed"
    """Lengths of sampled prompts and of their answers: all the longest, or drawn by seed from 1 to the longest."""
    tensor_parallel: Count = 1
    """How many ranks share each layer, by transformers' own plan."""
    compile: bool = False
    """Compile the decoding step; needs cache=static."""
    sample: bool | None = None
    """Draw tokens; false takes the likeliest; null is what the checkpoint says, else false."""
    temperature: Temperature | None = None
    """Sampling: below 1 is sharper; null is what the checkpoint says, else 1."""
    top_k: NotNegative | None = None
    """Sampling: only the k likeliest, 0 is off; null is what the checkpoint says, else 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sampling: only the likeliest that add up to p, 1 is off; null is what the checkpoint says, else 1."""
    stop_at_eos: bool = True
    """End a sequence at the checkpoint's end-of-sequence tokens."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Other fields of transformers' GenerationConfig, over the checkpoint's: generation.config.min_new_tokens=8."""
