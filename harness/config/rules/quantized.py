"""What a model's `quantization_config` requests, as far as that is known without torch or a hub.

A *method* packs the weights of linear layers into few bits, in its own layout. The weights stay *packed* in memory
where kernels can compute with them; else transformers makes them *whole* (dequantizes them) while it reads them.
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
"""When transformers unpacks weights; the record has these texts."""


class Method(NamedTuple):
    """What a method needs. `packages` are the pip packages that, beside transformers, read its weights.

    `dequantizes` says whether transformers can unpack its weights while it reads them. `capability` is the least
    compute capability of a GPU whose kernels compute with packed weights; where it is set, a CPU unpacks them.
    `layout` says whether the packed layout is known here. A method of unknown layout runs, but cannot be rehearsed.
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
"""Methods by transformers' own names; transformers may know others."""


def check(settings: Settings) -> None:
    """Refuse what cannot be done with packed weights, as far as that is known without a hub."""
    shape = shape_of(settings.model)
    config = merged(shape, settings.model)
    if config is None:
        check_whole(settings, stored(shape))
    elif method_of(config) in METHODS or settings.world.kind == "rehearsed":  # else transformers may know it
        check_given(settings, config, packed(config, settings.hardware.device, settings.hardware.capability))


def merged(shape: Mapping[str, Any], model: Model) -> dict[str, Any] | None:
    """The `quantization_config` in a config's `shape`, overridden by the settings; None means whole weights."""
    own = stored(shape)
    chosen = model.config.get(NAME, own) if model.path is not None else own
    if chosen is None:
        return None
    if not isinstance(chosen, Mapping):
        raise Refusal(
            KEY, chosen, "should be null, or a mapping such as {quant_method:awq,bits:4,group_size:128}"
        )
    if own is None or chosen is own:
        return dict(chosen)
    config = {**own, **chosen}
    if method_of(config) != method_of(own):
        reason = f"the checkpoint is packed by {method_of(own)}, and cannot be read as another; leave it out"
        raise Refusal(f"{KEY}.quant_method", method_of(config), reason)
    return config


def stored(shape: Mapping[str, Any]) -> Any:
    """The `quantization_config` in a config, or in that of its text model."""
    text = shape.get("text_config")
    return shape.get(NAME) or (text.get(NAME) if isinstance(text, Mapping) else None)


def method_of(config: Mapping[str, Any]) -> str:
    """The method's name. Raises Refusal where there is none."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    name = config.get("quant_method")
    if not isinstance(name, str):
        raise Refusal(f"{KEY}.quant_method", name, f"should name a method, as one of {', '.join(METHODS)}")
    return name


def packed(config: Mapping[str, Any], device: str, capability: float | None) -> bool | None:
    """Whether weights stay packed on a `device`: "cpu", "cuda" or "auto". None where it depends on what "auto" becomes.

    A GPU of unknown `capability` counts as one that has the kernels.
    """
    method = METHODS.get(method_of(config), Method())
    if method.dequantizes and (config.get("dequantize") or config.get("run_compressed") is False):
        return False
    if method.capability is None:
        return True
    if device == "auto":
        return None
    return device == "cuda" and (capability is None or capability >= method.capability)


def check_given(settings: Settings, config: Mapping[str, Any], packs: bool | None) -> None:
    """Refuse an unknown method, and what cannot be done with its weights. `packs` is the result of `packed`."""
    name = method_of(config)
    method = METHODS.get(name)
    rehearsed = settings.world.kind == "rehearsed"
    _check_forms(settings, config)
    if rehearsed and not (method and method.layout):
        reason = f"its layout is not known here, so neither is its size; {remedy(settings)}"
        raise refusal(settings.model, config, reason)
    if config.get("dequantize") and method and not method.dequantizes:
        reason = f"transformers does not unpack {name} weights as it reads them; leave it out"
        raise refusal(settings.model, config, reason, "dequantize")
    if settings.mode == "train" and not (method and method.dequantizes):
        raise refusal(settings.model, config, f"packed weights take no gradients; {remedy(settings)}")
    if settings.tensor_parallel > 1:
        reason = "packed weights are not shared among ranks here; use generation.tensor_parallel=1"
        raise refusal(settings.model, config, reason)
    missing = [each for each in (method.packages if method else ()) if not _installed(each)]
    if missing and not rehearsed and settings.model.path is not None and not settings.model.random:
        reason = f"{' and '.join(missing)} must be there to read them; pip install {' '.join(missing)}"
        raise refusal(settings.model, config, reason)
    if settings.mode == "train" or not packs:
        return
    if settings.pipeline.stages > 1:
        reason = "packed weights are not cut into stages here; use pipeline.stages=1"
        raise refusal(settings.model, config, reason)
    if settings.generation.compile:
        reason = "packed weights are not compiled here; use generation.compile=false"
        raise refusal(settings.model, config, reason)
    if not rehearsed and (settings.model.path is None or settings.model.random):
        raise refusal(
            settings.model, config, f"random weights are not packed; rehearse it, or {remedy(settings)}"
        )


def _check_forms(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuse fields whose form no method accepts."""
    if method_of(config) == "bitsandbytes" and not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        reason = "bitsandbytes packs into 4 bits or 8; say load_in_4bit=true or load_in_8bit=true"
        raise refusal(settings.model, config, reason, "load_in_4bit")
    for key in LISTS:
        names = config.get(key)
        if names is None or (isinstance(names, Sequence) and not isinstance(names, str) and _texts(names)):
            continue
        raise refusal(settings.model, config, f"should be a list of names; {remedy(settings)}", key)
    groups = config.get("config_groups")
    if groups is not None and not isinstance(groups, Mapping):
        raise refusal(settings.model, config, f"should be a mapping; {remedy(settings)}", "config_groups")


def _texts(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def check_whole(settings: Settings, own: Any) -> None:
    """Refuse to read a checkpoint as whole weights where its `own` quantization config says that they are packed."""
    model = settings.model
    if own and model.path is not None and not model.random and settings.world.kind != "rehearsed":
        name = method_of(own)
        dequantize = f", or {KEY}.dequantize=true" if METHODS.get(name, Method()).dequantizes else ""
        sentence = (
            f"the checkpoint is packed ({name}), and its weights are read; add model.random=true{dequantize}"
        )
        raise Refusal(KEY, None, sentence)


def refusal(model: Model, config: Mapping[str, Any], reason: str, key: str = "quant_method") -> Refusal:
    """A Refusal that names the packed checkpoint, or the `key` that requests packing."""
    name, value = method_of(config), config.get(key)
    if model.path is not None and NAME not in model.config:
        packed = name if key == "quant_method" else f"{name}, {key}={as_typed(value)}"
        return Refusal("model.path", model.path, f"its weights are packed ({packed}): {reason}")
    return Refusal(f"{KEY}.{key}", name if key == "quant_method" else value, reason)


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def remedy(settings: Settings) -> str:
    """How the user gets whole weights, in the run's precision."""
    model = settings.model
    if model.path is None or model.random or settings.world.kind == "rehearsed":
        return f"{KEY}=null leaves them unpacked"
    return f"give a checkpoint that is whole, or model.random=true {KEY}=null"
