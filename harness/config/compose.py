"""Composes `key=value` overrides into one config: Hydra's groups in `conf/`, over the defaults of every field."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harness.config.deepspeed_file import expanded
from harness.config.load import nearest, resolved, unresolved
from harness.config.rules.quantized import KEY, NAME
from harness.config.settings import Refusal, Settings, described_fields

RUN_DIR = "hydra.run.dir"

OPEN = ("generation.config.", "deepspeed.options.")
"""Keys below these belong to transformers and DeepSpeed, and no file here lists them: they need no + before them."""


def directory() -> Path:
    """`conf/`: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """The options of each group: the names of the files in its folder."""
    folders = sorted(each for each in directory().iterdir() if each.is_dir())
    return {folder.name: sorted(each.stem for each in folder.glob("*.yaml")) for folder in folders}


def defaults() -> dict[str, str]:
    """The default option of each group."""
    listed = OmegaConf.load(directory() / "config.yaml").defaults
    return {
        str(key): str(option) for each in listed if OmegaConf.is_dict(each) for key, option in each.items()
    }


def compose(arguments: Sequence[str]) -> DictConfig:
    """The config that the `key=value` arguments describe. Of Hydra's own node it keeps only `hydra.run.dir`.

    Raises Refusal for an argument that cannot be read, and for an option or a key that does not exist.
    """
    overrides = [_parse(argument) for argument in expanded(arguments).arguments]
    ConfigStore.instance().store("schema", dataclasses.asdict(Settings()))
    with initialize_config_dir(str(directory()), version_base="1.3"):
        try:
            lines = [str(override.input_line) for override in overrides]
            cfg = hydra_compose("config", lines, return_hydra_config=True)
        except HydraException as error:
            raise _refusal(error, overrides) from error
    resolved(cfg)
    try:
        run_dir = cfg.hydra.run.dir
    except OmegaConfBaseException as error:
        raise unresolved(error, cfg) from error
    if not str(run_dir).strip():
        raise Refusal(RUN_DIR, run_dir, "is empty; give it a value, or leave it out")
    with open_dict(cfg):
        cfg.hydra = {"run": {"dir": run_dir}}
        if cfg.model.path is not None:
            _take_shape_from_path(cfg, overrides)
        _take_memory_from_user(cfg, overrides)
    return cfg


def _take_shape_from_path(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Drop the group's shape from a config whose model comes from `model.path`, so that the config says what runs.

    Only overrides of `quantization_config` are kept.
    """
    packing = [each for each in overrides if _of_packing(each.key_or_group)]
    for override in overrides:
        if override.key_or_group.startswith("model.config") and override not in packing:
            raise Refusal(
                override.key_or_group,
                override.value(),
                "model.path= brings a config of its own; leave one out",
            )
    cfg.model.config = {NAME: cfg.model.config.get(NAME)} if packing else {}
    if not any(override.key_or_group == "model.name" for override in overrides):
        cfg.model.name = cfg.model.path


def _take_memory_from_user(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Drop the page's other figures where the user has set `hardware.memory`, so that the config says what counts."""
    typed = {override.key_or_group for override in overrides}
    if "hardware.memory" in typed:
        for name in {"memory_driver", "memory_torch"}:
            if f"hardware.{name}" not in typed:
                cfg.hardware[name] = None


def _parse(argument: str) -> Override:
    key, _, value = argument.partition("=")
    if f"{key}.".startswith(OPEN) or _of_packing(key):  # no group lists it, and any model may have it
        argument = f"++{argument}"
    try:
        override = OverridesParser.create().parse_override(_quoted(key, value) or argument)
    except HydraException as error:
        raise Refusal(key, value, f"cannot be read; put quotes within quotes, as \"{key}='...'\"") from error
    key, options = override.key_or_group, groups().get(override.key_or_group)
    if key.partition(".")[0].partition("/")[0] == "hydra" and key != RUN_DIR:
        raise Refusal(key, value, f"of Hydra's own keys only {RUN_DIR} has an effect here; leave it out")
    if override.is_sweep_override():
        raise Refusal(key, value, "sweeps are not supported; give one value, or a list as [a,b]")
    whole = described_fields().get(key.rpartition(".")[0])
    if whole is not None and isinstance(whole.default, list):
        name = key.rpartition(".")[0]
        raise Refusal(key, value, f"{name} is a list; give it as a whole, as {name}=[a,b]")
    if options and (override.is_add() or override.is_force_add()):
        raise Refusal(key, value, f"every group exists already; leave out the + of +{key}")
    if override.is_delete() and not key.startswith("model.config."):
        raise Refusal(key, value, "only keys of model.config can be left out")
    if options and override.value() not in options:
        raise Refusal(key, value, f"no such option; one of {', '.join(options)}")
    return override


def _of_packing(key: str) -> bool:
    """Whether `key` is `quantization_config`, or one in it."""
    return key == KEY or key.startswith(f"{KEY}.")


def _quoted(key: str, value: str) -> str | None:
    """The override with its text value in quotes, so that Hydra does not parse commas and brackets in it.

    None where the value is not text, or where the user has quoted it already.
    """
    field = described_fields().get(key)
    if not (key in groups() or key == RUN_DIR or (field and field.text)):
        return None
    if value == "null" or value.startswith(("'", '"', "[", "${")):
        return None
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def _refusal(error: HydraException, overrides: Sequence[Override]) -> Refusal:
    """Hydra's error about one of `overrides`, as a Refusal."""
    message = str(error)
    for override in overrides:
        key = override.key_or_group
        if f"'{key}'" in message or str(override.input_line) in message:
            value = override.value()
            if message.startswith("Could not override"):
                return Refusal(key, value, _missing_key_remedy(key, _known(overrides)))
            if message.startswith("Error merging override"):  # a dictionary for a list, or a list for a text
                return Refusal(key, value, _kind_remedy(key))
            if message.startswith("Could not append"):
                return Refusal(key, value, f"it exists already; leave out the + of +{key}")
            return Refusal(key, value, message.partition("\n")[0])
    return Refusal("config", "conf/config.yaml", message)


def _missing_key_remedy(key: str, known: Sequence[str]) -> str:
    """The remedy for a key that does not exist. A model's config may have keys that its group's shape does not list."""
    if not key.startswith("model.config."):
        return nearest(key, known)
    if key in known:
        return f"the group's shape does not have all of it; add new keys as ++{key}="
    return f"{nearest(key, known)} Where a model's config has it, ++{key}= adds it"


def _kind_remedy(key: str) -> str:
    """The remedy where the value has the wrong kind."""
    if isinstance(described_fields()[key].default if key in described_fields() else "", list):
        return "should be a valid list, as [a,b]"
    return "should be a valid string" if key == RUN_DIR else "should be a single value"


def _known(overrides: Sequence[Override]) -> list[str]:
    """Every key of the config, composed with only the group choices among `overrides`."""
    choices = [str(override.input_line) for override in overrides if override.key_or_group in groups()]
    return list(_paths(hydra_compose("config", choices)))


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name, value in node.items_ex(resolve=False):
        yield f"{prefix}{name!s}"
        if isinstance(value, DictConfig):
            yield from _paths(value, f"{prefix}{name!s}.")
