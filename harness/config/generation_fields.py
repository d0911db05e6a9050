"""The fields of transformers' `GenerationConfig`: which are honoured here, and why others are moot or refused."""

from typing import Annotated, Any, NamedTuple

from pydantic import Field

from harness.config.fields.generation import NEW_TOKENS
from harness.config.fields.kinds import NotNegative, NotNegativeFloat, Positive, PositiveFloat, Temperature

Share = Annotated[float, Field(gt=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Tokens = list[NotNegative]
Sequences = list[Annotated[Tokens, Field(min_length=1)]]
Bias = list[tuple[Annotated[Tokens, Field(min_length=1)], Annotated[float, Field(allow_inf_nan=False)]]]


class Kind(NamedTuple):
    """A field's type, and the value that turns it off. Null and an empty list turn every field off."""

    type: Any
    off: Any = None


SAMPLING = {
    "temperature": Kind(Temperature, 1.0),
    "top_k": Kind(NotNegative, 0),
    "top_p": Kind(Share, 1.0),
    "min_p": Kind(Annotated[float, Field(ge=0, le=1)], 0.0),
    "top_h": Kind(Share),
    "typical_p": Kind(Share, 1.0),
    "epsilon_cutoff": Kind(Below1, 0.0),
    "eta_cutoff": Kind(Below1, 0.0),
}
"""The fields that transformers' processors apply only when tokens are sampled."""

PROCESSED = {
    "repetition_penalty": Kind(PositiveFloat, 1.0),
    "encoder_repetition_penalty": Kind(PositiveFloat, 1.0),
    "no_repeat_ngram_size": Kind(NotNegative, 0),
    "encoder_no_repeat_ngram_size": Kind(NotNegative, 0),
    "sequence_bias": Kind(Bias),
    "bad_words_ids": Kind(Sequences),
    "min_length": Kind(NotNegative, 0),
    "min_new_tokens": Kind(NotNegative, 0),
    "forced_bos_token_id": Kind(NotNegative),
    "forced_eos_token_id": Kind(NotNegative | Tokens),
    "exponential_decay_length_penalty": Kind(tuple[NotNegative, NotNegativeFloat]),
    "suppress_tokens": Kind(Tokens),
    "begin_suppress_tokens": Kind(Tokens),
    "remove_invalid_values": Kind(bool, False),
    "renormalize_logits": Kind(bool, False),
    **SAMPLING,
}
"""All fields from which transformers builds its logits processors."""

HONOURED = {
    **PROCESSED,
    "do_sample": Kind(bool, False),
    "eos_token_id": Kind(NotNegative | Tokens),
    "max_new_tokens": Kind(Positive, NEW_TOKENS),
    "max_length": Kind(Positive),
}

OWN = {
    "do_sample": "sample",
    **{name: name for name in ("temperature", "top_k", "top_p", "max_new_tokens")},
}
"""The fields that have a key of their own in `generation`."""

_CACHE, _COMPILE = "generation.cache= says how keys and values are kept", "generation.compile= says it"
_PADDING, _BEAMS = (
    "padding is masked, and no prompt is empty",
    "it is for beam search, which is not supported",
)
_DRAFTS, _ONLY_TOKENS = "it is for assisted decoding, which is not supported", "only tokens are returned"

MOOT = {
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len"), _CACHE),
    **dict.fromkeys(("return_legacy_cache", "prefill_chunk_size", "continuous_batching_config"), _CACHE),
    **dict.fromkeys(("compile_config", "disable_compile"), _COMPILE),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), _PADDING),
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty"), _BEAMS),
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"), _DRAFTS),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"), _DRAFTS),
    **dict.fromkeys(("assistant_ensemble_weight", "max_matching_ngram_size", "speculation_type"), _DRAFTS),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), _ONLY_TOKENS),
    **dict.fromkeys(("output_logits", "return_dict_in_generate"), _ONLY_TOKENS),
    "low_memory": "contrastive search is not supported",
}
"""The fields that change no token here, each with the reason."""

_NO_BEAMS, _NO_DRAFTS = "beam search is not supported", "assisted decoding is not supported"

REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, _NO_BEAMS),
    "num_beam_groups": (1, _NO_BEAMS),
    "constraints": (None, _NO_BEAMS),
    "force_words_ids": (None, _NO_BEAMS),
    "num_return_sequences": (1, "each prompt is continued once"),
    "penalty_alpha": (0, "contrastive search is not supported"),
    "dola_layers": (None, "DoLa decoding is not supported"),
    "use_mtp": (False, _NO_DRAFTS),
    "prompt_lookup_num_tokens": (None, _NO_DRAFTS),
    "assistant_early_exit": (None, _NO_DRAFTS),
    "guidance_scale": (1, "guidance shows the model each prompt twice, which is not supported"),
    "watermarking_config": (None, "watermarking is not supported"),
    "token_healing": (False, "a prompt is continued as it is"),
    "stop_strings": (None, "a sequence ends at tokens of eos_token_id alone"),
    "max_time": (None, "an end by time is not reproducible; max_new_tokens ends it"),
}
"""The fields that cannot be honoured here: the value, beside null, that is accepted, and the reason."""

BOOKKEEPING = ("transformers_version", "_from_model_config", "_commit_hash")
"""The fields that describe the file itself."""

KNOWN = (*HONOURED, *MOOT, *REFUSED)
