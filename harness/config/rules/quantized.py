"""What a model's `quantization_config` asks for, as far as it can be known without torch or a hub.

A *method* packs the weights of linear layers into few bits, each in a layout of its own. They stay *packed* in memory,
or are made *whole* again as they are read, where what computes with packed ones is not there.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

from harness.config.rules.sources import shape_of
from harness.config.settings import Model, Refusal, Settings, as_typed

NAME = "quantization_config"
KEY = f"model.config.{NAME}"

LISTS = ("ignore", "llm_int8_skip_modules", "modules_to_convert", "modules_to_not_convert")
"""The fields of a `quantization_config` that are lists of modules' names."""

AT_LOAD = "as they are read"
AT_FIRST = "at the first forward"
"""When transformers makes packed weights whole, in the record's words."""


class Method(NamedTuple):
    """What a method needs. `packages` read it, beside transformers, by the names that pip knows.

    `dequantizes` is whether transformers can make its weights whole as it reads them. It does so on a CPU where
    `capability` is said: the least of a GPU whose kernels compute with packed ones. `layout` is whether what it packs
    into is known here: what is not is run, and is not rehearsed.
    """

    packages: tuple[str, ...] = ()
    dequantizes: bool = False
    capability: float | None = None
    layout: bool = True


METHODS = {
    "awq": Method(("gptqmodel",)),
    "gptq": Method(("gptqmodel", "optimum")),
    "bitsandbytes": Method(("bitsandbytes",)),
    "compressed-tensors": Method(("compressed-tensors",), dequantizes=True),
    "fp8": Method(dequantizes=True, capability=8.9),
    "mxfp8": Method(dequantizes=True, capability=8.9),
    "mxfp4": Method(dequantizes=True, capability=7.5),
    "bitnet": Method(),
    "quanto": Method(("optimum-quanto",)),
    "aqlm": Method(("aqlm",), layout=False),
    "auto-round": Method(("auto-round",), layout=False),
    "hqq": Method(("hqq",), layout=False),
    "quark": Method(("amd-quark",), layout=False),
    "torchao": Method(("torchao",), layout=False),
    "vptq": Method(("vptq",), layout=False),
}
"""By the names that transformers has for them; it may know others."""


def check(settings: Settings) -> None:
    """Refuse what cannot be done with weights that are packed, where no hub must be asked whether they are."""
    shape = shape_of(settings.model)
    given = merged(shape, settings.model)
    if given is None:
        check_whole(settings, stored(shape))
    elif method_of(given) in METHODS or settings.world.kind == "rehearsed":  # else transformers may know it
        check_given(settings, given, packed(given, settings.hardware.device, settings.hardware.capability))


def merged(shape: Mapping[str, Any], model: Model) -> dict[str, Any] | None:
    """The `quantization_config` of a config's `shape`, with what the settings say over it; None: weights are whole."""
    own = stored(shape)
    said = model.config.get(NAME, own) if model.path is not None else own
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise Refusal(
            KEY, said, "should be null, or a mapping such as {quant_method:awq,bits:4,group_size:128}"
        )
    if own is None or said is own:
        return dict(said)
    together = {**own, **said}
    if method_of(together) != method_of(own):
        told = f"the checkpoint is packed by {method_of(own)}, and cannot be read as another; leave it out"
        raise Refusal(f"{KEY}.quant_method", method_of(together), told)
    return together


def stored(shape: Mapping[str, Any]) -> Any:
    """The `quantization_config` in a config, or in that of its text model."""
    text = shape.get("text_config")
    return shape.get(NAME) or (text.get(NAME) if isinstance(text, Mapping) else None)


def method_of(given: Mapping[str, Any]) -> str:
    """The method's name. Raises Refusal where there is none."""
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return "bitsandbytes"
    name = given.get("quant_method")
    if not isinstance(name, str):
        raise Refusal(f"{KEY}.quant_method", name, f"should name a method, as one of {', '.join(METHODS)}")
    return name


def packed(given: Mapping[str, Any], device: str, capability: float | None) -> bool | None:
    """Whether weights stay packed on a `device` ("cpu", "cuda"; "auto": None where that decides it).

    A GPU whose `capability` nobody told is taken to have the kernels.
    """
    method = METHODS.get(method_of(given), Method())
    if method.dequantizes and (given.get("dequantize") or given.get("run_compressed") is False):
        return False
    if method.capability is None:
        return True
    if device == "auto":
        return None
    return device == "cuda" and (capability is None or capability >= method.capability)


def check_given(settings: Settings, given: Mapping[str, Any], packs: bool | None) -> None:
    """Refuse a method that is not known, and what cannot be done with it. `packs` is as `packed` says."""
    name = method_of(given)
    method = METHODS.get(name)
    rehearsed = settings.world.kind == "rehearsed"
    _check_forms(settings, given)
    if rehearsed and not (method and method.layout):
        unknown = f"its layout is not known here, so neither is its size; {remedy(settings)}"
        raise refusal(settings.model, given, unknown)
    if given.get("dequantize") and method and not method.dequantizes:
        told = f"transformers makes no {name} weights whole as it reads them; leave it out"
        raise refusal(settings.model, given, told, "dequantize")
    if settings.mode == "train" and not (method and method.dequantizes):
        raise refusal(settings.model, given, f"packed weights take no gradients; {remedy(settings)}")
    if settings.tensor_parallel > 1:
        shared = "packed weights are not shared among ranks here; use generation.tensor_parallel=1"
        raise refusal(settings.model, given, shared)
    missing = [each for each in (method.packages if method else ()) if not _installed(each)]
    if missing and not rehearsed and settings.model.path is not None and not settings.model.random:
        needed = f"{' and '.join(missing)} must be there to read them; pip install {' '.join(missing)}"
        raise refusal(settings.model, given, needed)
    if settings.mode == "train" or not packs:
        return
    if settings.pipeline.stages > 1:
        cut = "packed weights are not cut into stages here; use pipeline.stages=1"
        raise refusal(settings.model, given, cut)
    if settings.generation.compile:
        compiled = "packed weights are not compiled here; use generation.compile=false"
        raise refusal(settings.model, given, compiled)
    if not rehearsed and (settings.model.path is None or settings.model.random):
        raise refusal(
            settings.model, given, f"random weights are not packed; rehearse it, or {remedy(settings)}"
        )


def _check_forms(settings: Settings, given: Mapping[str, Any]) -> None:
    """Refuse fields of another form than any method has for them."""
    if method_of(given) == "bitsandbytes" and not (given.get("load_in_4bit") or given.get("load_in_8bit")):
        told = "bitsandbytes packs into 4 bits or 8; say load_in_4bit=true or load_in_8bit=true"
        raise refusal(settings.model, given, told, "load_in_4bit")
    for key in LISTS:
        names = given.get(key)
        if names is None or (isinstance(names, Sequence) and not isinstance(names, str) and _texts(names)):
            continue
        raise refusal(settings.model, given, f"should be a list of names; {remedy(settings)}", key)
    groups = given.get("config_groups")
    if groups is not None and not isinstance(groups, Mapping):
        raise refusal(settings.model, given, f"should be a mapping; {remedy(settings)}", "config_groups")


def _texts(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def check_whole(settings: Settings, own: Any) -> None:
    """Refuse to read a checkpoint, packed as its `own` config says, as if it were whole."""
    model = settings.model
    if own and model.path is not None and not model.random and settings.world.kind != "rehearsed":
        name = method_of(own)
        read = f", or {KEY}.dequantize=true" if METHODS.get(name, Method()).dequantizes else ""
        told = f"the checkpoint is packed ({name}), and its weights are read; add model.random=true{read}"
        raise Refusal(KEY, None, told)


def refusal(model: Model, given: Mapping[str, Any], told: str, key: str = "quant_method") -> Refusal:
    """It names the checkpoint that is packed, or the `key` that asks for it."""
    name, value = method_of(given), given.get(key)
    if model.path is not None and NAME not in model.config:
        packed = name if key == "quant_method" else f"{name}, {key}={as_typed(value)}"
        return Refusal("model.path", model.path, f"its weights are packed ({packed}): {told}")
    return Refusal(f"{KEY}.{key}", name if key == "quant_method" else value, told)


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def remedy(settings: Settings) -> str:
    """How to have weights in the run's precision."""
    model = settings.model
    if model.path is None or model.random or settings.world.kind == "rehearsed":
        return f"{KEY}=null has them whole"
    return f"give a checkpoint that is whole, or model.random=true {KEY}=null"
