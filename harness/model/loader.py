"""Build a transformers model from a config with random weights, or load it from a checkpoint; export it as a
checkpoint.
"""

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from harness.config.errors import first_line, ours
from harness.config.settings import Model, Refusal
from harness.model import init_weights, manifest, shape, storages, tensor_parallel, widths
from harness.quantization import nf4
from harness.quantization.method import Quantization
from harness.record import results
from harness.runtime import faults
from harness.runtime.files import move, part_of, writing
from harness.runtime.memory_limit import check_parameters, shortage

TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = ("model*.safetensors",)
"""File patterns to download from the hub: configs and tokenizers, and weights; never pickles, never code."""


def model_config(settings: Model) -> PretrainedConfig:
    """The transformers config of `settings`: from `model.config`, or from `model.path`. Raises Refusal."""
    if settings.path is not None:
        with loading(settings.path):
            directory = directory_of(settings.path)
            manifest.check(settings.path, directory, TEXTS)
            shape.check_stored(settings, directory)
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    else:
        config = shape.config_from_settings(settings)
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or bidirectional:
        key, value = (
            ("model.path", settings.path) if settings.path else ("model.config.model_type", config.model_type)
        )
        remedy = (
            f"{config.model_type} is not a causal language model in transformers; give one, as llama or qwen3"
        )
        raise Refusal(key, value, remedy)
    return config


def build(
    settings: Model,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    read: bool = True,
    mesh: DeviceMesh | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model in `dtype` on `device`: with the weights of `model.path`, or with random ones that depend only on
    `seed`.

    With `mesh` this rank has its part of the weights (`tensor_parallel.py`). With `quantization` the weights are packed
    at load, or are already packed in the checkpoint.

    Every parameter has a storage of its own and of exactly its size. Raises Refusal where memory is too small, or the
    checkpoint is corrupt, pickled, or has missing, unexpected or mismatched weights. Without `read` the weights have
    their shapes, and no checkpoint is read.
    """
    model = tensor_parallel.outline(config, dtype, settings.attention, mesh)
    widths.check(settings, model)
    stand_ins = quantization is not None and quantization.packed and not quantization.trained
    if quantization is not None and quantization.stays(read):
        quantization.pack(model, settings)
    if read and (quantization is None or quantization.known):
        check_parameters(settings, tensor_parallel.nbytes(model), dtype, device)
    if settings.path is None or settings.random or not read:
        if quantization is not None and quantization.trained:  # its layers are packed one after another
            model = tensor_parallel.outline(config, dtype, settings.attention, mesh)
            with quantization.packing(model) as pack:
                unset = init_weights.make(model, list(init_weights.modules(model)), model, device, seed, pack)
        else:
            unset = init_weights.make(model, list(init_weights.modules(model)), model, device, seed)
        if (settings.path is None or settings.random) and not stand_ins:
            check_values(settings, unset)
        return model
    set_seed(seed)
    # the ledger does not see tensors that other threads allocate
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    directory = whole_checkpoint(settings.path)
    options = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": settings.attention,
        "device_map": {"": device},
        "use_safetensors": True,
        "trust_remote_code": False,
        "ignore_mismatched_sizes": True,  # they are in the report; _check_weights refuses them
        "output_loading_info": True,
        "generation_config": GenerationConfig(),  # not the checkpoint's: an invalid one must not fail the load
        **({} if quantization is None else quantization.options(config)),
    }
    with loading(settings.path):
        if mesh is None:
            loaded, report = AutoModelForCausalLM.from_pretrained(directory, **options)
        else:
            loaded, report = tensor_parallel.load(directory, model, mesh, **options)
    _check_weights(settings.path, report)
    if quantization is not None and not quantization.as_read(loaded).packed:
        vars(loaded).pop("_weight_conversions", None)  # else saving would pack the weights again
    storages.give_own_storage(loaded)
    if quantization is not None and quantization.trained:
        nf4.keep_layout(loaded)
        del loaded.hf_quantizer  # else saving an adapter would take the state of the whole model
    return loaded


def count(model: torch.nn.Module) -> int:
    """Number of parameters; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(
    settings: Model, model: PreTrainedModel, dtype: torch.dtype, quantization: Quantization | None = None
) -> results.Model:
    """The record's `model`, of a whole model that computes in `dtype`.

    A packed weight counts as the elements that it stands for.
    """
    counted: torch.nn.Module = model
    packed: dict[str, Any] = {}
    if quantization is not None:
        counted = init_weights.outline(copy.deepcopy(model.config), next(model.parameters()).dtype)
        packed["quantization"] = quantization.as_record(storages.nbytes(model))
    return results.Model(
        name=settings.name,
        parameters=count(counted),
        embeddings=embedding_elements(model),
        **packed,
        dtype=str(dtype).removeprefix("torch."),
    )


def embedding_elements(model: torch.nn.Module) -> int:
    """Elements of embedding tables that are not also the weight of a linear layer: each token reads one row of them."""
    tables = {each.weight for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    linears = (each for each in model.modules() if isinstance(each, torch.nn.Linear))
    tables -= {each.weight for each in linears if hasattr(each, "weight")}  # a packed layer may have none
    return sum(table.numel() for table in tables)


def export(
    model: torch.nn.Module,
    state: Mapping[str, torch.Tensor] | None,
    tokens: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    directory: Path,
) -> None:
    """Write `model` with the weights in `state`, its tokenizer and its `generation` config. The directory appears
    complete or not at all.

    The tokenizer's end token, which ends each training text, is added to the generation config's end tokens. Raises
    NotWritten.
    """
    assert isinstance(model, PreTrainedModel)
    model.generation_config = (
        GenerationConfig()
    )  # transformers refuses to save some checkpoints' generation configs
    ends = generation.get("eos_token_id") or []
    ends = [ends] if isinstance(ends, int) else [*ends]
    if tokens.eos_token_id not in (None, *ends):
        generation = {**generation, "eos_token_id": [tokens.eos_token_id, *ends]}
    weights = dict(state) if state is not None else None
    nbytes = storages.nbytes(model) if weights is None else sum(each.nbytes for each in weights.values())
    partial = part_of(directory)
    with quiet(), writing(directory, nbytes):
        try:
            faults.at("export", nbytes)
            model.save_pretrained(partial, state_dict=weights)
            tokens.save_pretrained(partial)
            text = json.dumps(generation, indent=2)
            (partial / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
            manifest.write(partial, (*TEXTS, "*.safetensors"))
            move(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def whole_checkpoint(place: str) -> Path:
    """The directory of `place`, after a check that all its weights are there, in safetensors. Raises Refusal."""
    with loading(place):
        directory = directory_of(place, TEXTS + WEIGHTS)
        _check_files(place, directory)
        manifest.check(place, directory, WEIGHTS)
    return directory


def check_values(settings: Model, unset: set[str]) -> None:
    """Raise Refusal for a model with parameters or buffers (`unset`) that nothing initialises."""
    if unset:
        key, value = ("model.path", settings.path) if settings.path else ("model", settings.name)
        remedy = (
            f"transformers does not initialise its {min(unset)}; only a checkpoint of it, read whole, has one"
        )
        raise Refusal(key, value, remedy)


def _check_files(place: str, directory: Path) -> None:
    """Raise Refusal for a checkpoint that is incomplete or not in safetensors; the message names the file."""
    names = [SAFE_WEIGHTS_NAME]
    if not (directory / SAFE_WEIGHTS_NAME).is_file() and (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        try:
            index = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(
                "model.path", place, f"{SAFE_WEIGHTS_INDEX_NAME} in it is corrupt: {error}"
            ) from error
    elif not (directory / SAFE_WEIGHTS_NAME).is_file() and any(directory.glob("*.bin")):
        raise Refusal(
            "model.path",
            place,
            "its weights are pickled (*.bin), and opening a pickle can run code; where you trust them, convert them "
            "once with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )
    for name in names:
        if not (directory / name).is_file():
            raise Refusal("model.path", place, f"{name} is missing in it; give a complete checkpoint")
        try:
            with safe_open(directory / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise Refusal("model.path", place, f"{name} in it is corrupt: {first_line(error)}") from error


def _check_weights(place: str, report: Mapping[str, Any]) -> None:
    """Raise Refusal where transformers' loading `report` lists missing, unexpected or mismatched weights."""
    problem = mismatch(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    if problem:
        raise Refusal("model.path", place, f"its weights are not this model's: {problem}")


def mismatch(
    missing: Collection[str], unexpected: Collection[str], reshaped: Iterable[tuple[str, Any, Any]]
) -> str:
    """The first way in which stored tensors are not a model's, by number and first name; empty where they are. Of
    `reshaped` ones the name, the stored shape and the model's.
    """
    shapes = [f"{name} ({list(stored)}, not {list(own)})" for name, stored, own in reshaped]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return next((f"{len(names)} {kind}, {min(names)} first" for kind, names in problems.items() if names), "")


def directory_of(place: str, patterns: tuple[str, ...] = TEXTS) -> Path:
    """`place` if it is a directory, else the snapshot of that hub repository, with only the files of `patterns`."""
    path = Path(place).expanduser()
    if path.is_file():
        raise NotADirectoryError("it is a file; give the directory that contains it")
    return path if path.is_dir() else Path(snapshot_download(place, allow_patterns=list(patterns)))


@contextmanager
def loading(place: str, key: str = "model.path") -> Iterator[None]:
    """Turn any error while `place` is loaded into a Refusal."""
    try:
        with quiet():
            yield
    except Refusal:
        raise
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        message = " ".join(str(error).split())
        raise Refusal(key, place, f"no such directory, and the hub did not return it: {message}") from error
    except HFValidationError as error:
        remedy = "no such directory; give one that is there, or a name on the hub, as owner/name"
        raise Refusal(key, place, remedy) from error
    except Exception as error:  # tokenizers raises plain Exception, and model classes raise any type
        if shortage(error) or ours(error):
            raise
        raise Refusal(key, place, f"it cannot be loaded: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing reports and progress bars: this code reports an error once, in one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
