"""Composes `key=value` overrides into one config: Hydra's groups in `conf/`, over the defaults of every field."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.config import hydra_keys
from harness.config.command_line import Command, split
from harness.config.deepspeed_file import expanded
from harness.config.groups import directory as directory
from harness.config.groups import groups as groups
from harness.config.hydra_keys import RUN_DIR
from harness.config.load import resolved, unresolved
from harness.config.refusal import nearest
from harness.config.rules.quantized import KEY, NAME
from harness.config.settings import Refusal, described_fields

OPEN = ("generation.config.", "deepspeed.options.")
"""Keys below these belong to transformers and DeepSpeed, and no file here lists them: they need no + before them."""

SWEEP = "several values; add -m to run each, or give one value, or a list as [a,b]"
"""The remedy for several values in a run."""

_HOME = re.compile(r"([=,])(~[^,'\"()\[\]{}]*)")
"""A path from the home directory, among the values of a sweep: Hydra's grammar wants it in quotes."""

_WORD = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][a-z0-9_-]*", re.IGNORECASE)
"""What Hydra's grammar takes for text."""

_SEVERAL = re.compile(r",|^(choice|range|interval|glob|shuffle|sort|tag)\(")


def compose(arguments: Sequence[str]) -> DictConfig:
    """The config that the overrides, and flags such as --config-dir, among the arguments describe.

    Of Hydra's own node it keeps what a run needs: `run.dir`, `job.env_set` and `verbose`. Raises Refusal for an
    argument that cannot be read, and for an option or a key that does not exist.
    """
    command = split(arguments)
    overrides = [_parse(argument) for argument in expanded(command.overrides).arguments]
    cfg = _by_hydra(command, overrides)
    node = cfg.hydra
    if str(node.mode).endswith("MULTIRUN"):
        raise Refusal("hydra.mode", "MULTIRUN", "this config is a sweep; add -m")
    HydraConfig.instance().set_config(cfg)  # ${hydra:...} in a value reads it
    resolved(cfg)
    try:
        run_dir, env_set = node.run.dir, OmegaConf.to_container(node.job.env_set, resolve=True)
    except OmegaConfBaseException as error:
        raise unresolved(error, cfg) from error
    if not str(run_dir).strip():
        raise Refusal(RUN_DIR, run_dir, "is empty; give it a value, or leave it out")
    with open_dict(cfg):
        cfg.hydra = {
            "run": {"dir": os.path.expanduser(run_dir)},
            "job": {"env_set": env_set},
            "verbose": node.verbose,
        }
        if OmegaConf.select(cfg, "model.path") is not None:
            _take_shape_from_path(cfg, overrides)
        _take_memory_from_user(cfg, overrides)
    return cfg


@contextmanager
def _initialized(command: Command) -> Iterator[None]:
    """Hydra, where it looks for what `command` names."""
    hydra_keys.make_ready(command.directory("--config-dir"))
    primary = command.directory("--config-path") or str(directory())
    with initialize_config_dir(primary, job_name="harness", version_base="1.3"):
        yield


def _by_hydra(command: Command, overrides: Sequence[Override]) -> DictConfig:
    """What Hydra composes, with its own node. Raises Refusal."""
    lines = [str(override.input_line) for override in overrides]
    try:
        with _refusals(command, overrides), _initialized(command):
            return hydra_compose(command.config_name, lines, return_hydra_config=True)
    except (YAMLError, ValueError, RecursionError) as error:  # a file of the user's own
        said = "does it take itself?" if isinstance(error, RecursionError) else str(error)
        quotes = " (an option that looks like a number needs quotes)" if ": int" in said else ""
        remedy = f"Hydra cannot read it, or a file that it takes: {said}{quotes}"
        raise Refusal("config", command.config_name, remedy) from error


@contextmanager
def _refusals(command: Command, overrides: Sequence[Override]) -> Iterator[None]:
    """Raise Refusal for an error of Hydra's."""
    try:
        yield
    except HydraException as error:
        with _initialized(command):
            refusal = _refusal(error, overrides)
        raise refusal from error
    except ValueError as error:
        if "group override" not in str(error):  # an option of a user's own group that looks like a number
            raise
        lines = " ".join(str(override.input_line) for override in overrides)
        raise Refusal(
            "config", command.config_name, f"{error}, in {lines}; put an option as KEY=\\'3\\'"
        ) from error


def hydra_node(command: Command) -> DictConfig:
    """Hydra's own node of a sweep's config; what the sweep gives several values has the default."""
    overrides = [override for override in _of_sweep(command) if not override.is_sweep_override()]
    cfg = _by_hydra(command, overrides)
    HydraConfig.instance().set_config(cfg)
    return cfg.hydra  # type: ignore[no-any-return]


def through_hydra(command: Command, task: Callable[[DictConfig], Any], pinned: Sequence[str] = ()) -> None:
    """What `hydra.main` does with `command`: a sweep of `task`, or one of the flags that only print.

    `pinned` are overrides that come last. Raises Refusal, SystemExit, and what a job of the sweep raises.
    """
    overrides = _of_sweep(command) if "--multirun" in command.flags else list(map(_parse, command.overrides))
    lines = [*(str(override.input_line) for override in overrides), *pinned]
    flags = [
        f"{flag}={value}" if value else flag for flag, value in command.flags.items() if "config" not in flag
    ]
    hydra_keys.make_ready(command.directory("--config-dir"))
    primary = command.directory("--config-path") or str(directory())
    with _refusals(command, overrides), _typed(["harness", *flags, *lines]):
        hydra.main(primary, command.config_name, version_base="1.3")(task)()


@contextmanager
def _typed(words: list[str]) -> Iterator[None]:
    """`words` as this process's own, which is where Hydra reads them; it raises errors and prints none."""
    argv, environment = sys.argv, dict(os.environ)
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = words, "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


def _of_sweep(command: Command) -> list[Override]:
    """The overrides of a sweep, in Hydra's own grammar: a comma separates values, unless it is within quotes."""
    overrides = []
    for argument in command.overrides:
        override = _parsed(argument, _HOME.sub(r"\1'\2'", _opened(argument)))
        if override.is_hydra_override():
            if override.is_sweep_override():
                value = argument.partition("=")[2]
                raise Refusal(
                    override.key_or_group, value, "Hydra's own keys take no several values; give one"
                )
            hydra_keys.check(override.key_or_group, override.value(), sweep=True)
        overrides.append(_named(override))
    return overrides


def _named(override: Override) -> Override:
    """`override` with the options of a group as text: Hydra takes 0 in zero=0,1 for a number, and refuses numbers."""
    options = groups().get(override.key_or_group)
    if options is None or override.is_delete():
        return override
    value: Any = override.value()
    if isinstance(value, dict) or (
        isinstance(value, list) and not all(isinstance(each, str) for each in value)
    ):
        raise Refusal(
            override.key_or_group, value, f"no such option; one of {', '.join(options)}"
        )  # Hydra fails for these
    if isinstance(value, Glob):
        if all(map(_WORD.fullmatch, options)):
            return override  # Hydra knows the options of the user's own too
        names = value.filter(options)
    elif override.is_discrete_sweep():
        names = [each.strip("'\"") for each in override.sweep_string_iterator()]
    elif isinstance(value, int):
        names = [str(value)]
    else:
        return override
    listed = ",".join(map(_as_text, names))
    return _parsed(str(override.input_line), f"{override.get_key_element()}={listed}")


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
    """An override of a run. Text needs no quotes, whatever is in it."""
    key, _, value = argument.partition("=")
    override = _parsed(argument, _quoted(key, value) or _opened(argument))
    if override.is_hydra_override():
        hydra_keys.check(override.key_or_group, override.value())
    if override.is_sweep_override():
        raise Refusal(override.key_or_group, value, SWEEP)
    whole = described_fields().get(key.rpartition(".")[0])
    if whole is not None and isinstance(whole.default, list):
        name = key.rpartition(".")[0]
        raise Refusal(key, value, f"{name} is a list; give it as a whole, as {name}=[a,b]")
    return _named(override)


def _parsed(argument: str, line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        key, _, value = argument.partition("=")
        raise Refusal(key, value, f"cannot be read; put quotes within quotes, as \"{key}='...'\"") from error


def _opened(argument: str) -> str:
    """`argument`, with ++ where its key needs none: no group lists it, and any model may have it."""
    key = argument.partition("=")[0]
    return f"++{argument}" if f"{key}.".startswith(OPEN) or _of_packing(key) else argument


def _of_packing(key: str) -> bool:
    """Whether `key` is `quantization_config`, or one in it."""
    return key == KEY or key.startswith(f"{KEY}.")


def _quoted(key: str, value: str) -> str | None:
    """The override with its text value in quotes, so that Hydra does not parse commas and brackets in it.

    None where the value is not text, or where the user has quoted it already.
    """
    field = described_fields().get(key)
    if key in groups() and _SEVERAL.search(value):
        return None
    if not (key in groups() or key == RUN_DIR or (field and field.text)):
        return None
    if value == "null" or value.startswith(("'", '"', "[", "${")):
        return None
    return f"{key}={_as_text(value)}"


def _as_text(value: str) -> str:
    """`value` so that Hydra reads it as text: in quotes, but a word without, as in `override_dirname`."""
    return value if _WORD.fullmatch(value) else QuotedString(value, Quote.single).with_quotes()


def _refusal(error: HydraException, overrides: Sequence[Override]) -> Refusal:
    """Hydra's error about one of `overrides`, as a Refusal."""
    message = str(error)
    if isinstance(error, MissingConfigException):
        return _missing(error)
    for override in overrides:
        key = override.key_or_group
        if re.search(rf"('| ){re.escape(key)}('|\. )", message) or str(override.input_line) in message:
            value = (
                override.value()
                if not override.is_sweep_override()
                else str(override.input_line).partition("=")[2]
            )
            if message.startswith("Could not override"):
                return Refusal(key, value, _missing_key_remedy(key, _known(overrides)))
            if message.startswith("Error merging override"):  # a dictionary for a list, or a list for a text
                return Refusal(key, value, _kind_remedy(key, str(error.__cause__)))
            if message.startswith("Could not append") or (
                message.startswith("Multiple values") and override.is_add()
            ):
                return Refusal(key, value, f"it exists already; leave out the + of +{key}")
            return Refusal(key, value, message.partition("\n")[0])
    return Refusal("config", "conf/config.yaml", message)


def _missing(error: MissingConfigException) -> Refusal:
    """Hydra's error about an option, or a primary config, that does not exist."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    extra = hydra_keys.PLUGINS.get(option)
    if group == "hydra/launcher" and extra:
        remedy = f"hydra-{extra}-launcher is not installed; install it with pip install 'harness[{extra}]'"
    elif group:
        options = sorted(error.options or groups().get(group) or [])
        remedy = (
            f"no such option; one of {', '.join(options)}"
            if options
            else "no such group; --config-dir adds yours"
        )
    else:
        return Refusal("--config-name", option, "no such config; --config-dir adds a directory of yours")
    return Refusal(group, option, remedy)


def _missing_key_remedy(key: str, known: Sequence[str]) -> str:
    """The remedy for a key that does not exist. A model's config may have keys that its group's shape does not list."""
    if key.startswith("hydra."):
        return f"no such key; +{key}= adds it"
    if not key.startswith("model.config."):
        return nearest(key, known)
    if key in known:
        return f"the group's shape does not have all of it; add new keys as ++{key}="
    return f"{nearest(key, known)} Where a model's config has it, ++{key}= adds it"


def _kind_remedy(key: str, message: str) -> str:
    """The remedy where the value has the wrong kind, which OmegaConf's `message` says of Hydra's own keys."""
    if "expected one of" in message:
        return f"should be one of {message.partition('expected one of [')[2].partition(']')[0]}"
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
