"""The command line: `key=value` overrides compose a config and run it; a tool's name passes on the rest to the tool."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

from harness import __version__
from harness.config.refusal import Refusal
from harness.runtime import launcher, tracebacks
from harness.runtime.files import NotWritten
from harness.runtime.imports import without_collection
from harness.runtime.neighbours import known
from harness.runtime.watcher import Watcher, watching

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from harness.config.command_line import Command

TOOLS = {
    "check": (
        "check",
        "[RUN] --baseline FILE | --all   compare a run, or rehearsals, with baselines, to the byte; --update",
    ),
    "verify": (
        "check.verify",
        "[--quick] [--out DIR]   real runs on this machine, beside their rehearsals, to the byte; --only NAME, --json",
    ),
    "compare": (
        "analysis.compare",
        "RUN RUN [...]   runs side by side, category by category; --json, --markdown",
    ),
    "report": (
        "report",
        "RUN [...] -o DIR  a page that shows them; --perfetto, --tensorboard, --chakra, --csv, --parquet, --markdown",
    ),
    "contrast": (
        "analysis.sweeps.stages",
        "RUN RUN [...]  what activations a stage keeps, by the number of stages, in either mode; --json",
    ),
    "batching": (
        "analysis.sweeps.batch",
        "RUN RUN [...]  what a larger batch gains and costs in generation, by the context; --json",
    ),
    "caching": (
        "analysis.sweeps.cache",
        "RUN RUN [...]   what a KV cache saves and costs, by the tokens that are generated; --json",
    ),
    "fit": (
        "advice.fit",
        "mode=... world.size=N hardware=NAME [...]   which configs fit, and the cheapest's command; --html, --json",
    ),
    "roofline": (
        "analysis.speed.roofline",
        "RUN [...]      whether it is compute-bound or memory-bound, and where that changes; --hardware NAME, --json",
    ),
    "traffic": (
        "analysis.moves.traffic",
        "RUN [...]       what a step, a batch and a token move, by link and phase, and what for; --json",
    ),
    "links": (
        "analysis.moves.links",
        "[RUN]             what each link must carry, how long at best; --step-seconds S, --nodes N --gpus G, --json",
    ),
    "explain": (
        "advice.explain",
        "RUN             what uses its memory, and the change that would save most; --no-rehearsal, --json",
    ),
}
"""Each tool: its module in `harness`, which has a `main`, and its line of help."""

EXTRAS = {
    "run": ("transformers", "deepspeed", "accelerate", "datasets", "huggingface_hub", "safetensors"),
    "report": ("jinja2", "plotly"),
}
"""The extras of pyproject.toml that commands need, and the packages that each brings."""

NEEDS = {"fit": "run", "report": "report", "verify": "run"}
"""The extra that a tool needs."""

USAGE = """\
Train a causal language model or generate with one, and see what every byte on every rank is.

  python -m harness mode=train [key=value ...]
  python -m harness mode=infer model.path=RUN/checkpoint [key=value ...]
  torchrun --standalone --nproc-per-node 2 -m harness mode=train zero=2 [key=value ...]
  python -m harness -m zero=0,1,2 [key=value ...]   a sweep: a run for each value, as Hydra does it
  python -m harness --cfg job [key=value ...]       check and print the config, run nothing
  python -m harness --version

A run leaves record.json, config.yaml and its results in hydra.run.dir=DIR, else in outputs/DATE/TIME-MODE; a sweep
leaves a directory for each run in hydra.sweep.dir=DIR, else in multirun/DATE/TIME.
An error is one sentence on stderr; under torchrun a traceback follows that ends with the same sentence. Where an
error is unexpected, the sentence names the file that has its traceback.
"""


class Absent(Exception):
    """A package that a command needs is not installed; the sentence names it, and what installs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the arguments. Exit code: 0 done, 1 a check does not hold, 2 a wrong request, 3 a failed run.

    75: a run that a signal has ended, and that has saved its state before.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _carry_out(arguments)
    except (Absent, Refusal) as refusal:
        return _refuse(str(refusal))
    except NotWritten as error:
        return _refuse(str(error), code=3)
    except BrokenPipeError:
        raise  # `console` ends quietly
    except Exception as error:
        return _failed(error)


def usage() -> str:
    """The text of `--help`: the commands, the tools, the flags, the groups in `conf/` and every key."""
    from harness.config.command_line import FLAGS
    from harness.config.groups import defaults, groups
    from harness.config.settings import as_typed, described_fields

    starred = defaults()
    lines = [USAGE, "Tools", *(f"  {name} {line}" for name, (_, line) in TOOLS.items())]
    lines += ["", "Flags"]
    for name, flag in FLAGS.items():
        names = ", ".join(filter(None, (flag.short, name)))
        lines.append(
            f"  {names:<23} {flag.meaning}{f' ({chr(44).join(flag.choices)})' if any(flag.choices) else ''}"
        )
    lines += ["", "Groups, as zero=2; * marks the default"]
    for group, options in groups().items():
        listed = (f"{each}*" if each == starred.get(group) else each for each in options)
        lines.append(f"  {group:<10} {'  '.join(listed)}")
    lines += ["", "Keys, as train.steps=100, with their defaults"]
    for key, field in described_fields().items():
        choices = f" ({', '.join(field.choices)})" if field.choices else ""
        lines.append(f"  {f'{key}={as_typed(field.default)}':<38} {field.meaning}{choices}")
    return "\n".join(lines)


def _carry_out(arguments: list[str]) -> int:
    if arguments and arguments[0] in TOOLS:
        _require(NEEDS.get(arguments[0]))
        with without_collection():
            tool = import_module(f"harness.{TOOLS[arguments[0]][0]}")
        return int(tool.main(arguments[1:]))
    if not arguments or {"-h", "--help"} & {*arguments}:
        return _say(usage())
    if "--version" in arguments:
        return _say(f"harness {__version__}")
    from harness.config.command_line import split

    command = split(arguments)
    if "--shell-completion" in command.flags:
        return _by_hydra(command)
    for argument in command.overrides:
        if "=" not in argument and not argument.startswith("~"):
            from difflib import get_close_matches

            close = get_close_matches(argument, TOOLS, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the keys and the tools"
            return _refuse(f"{argument}: neither key=value nor a tool; {hint}")
    if {"--info", "--hydra-help"} & command.flags.keys():
        return _by_hydra(command)
    if "--multirun" in command.flags or "hydra.mode=MULTIRUN" in command.overrides:
        _require("run")
        from harness.advice.jobs import sweep

        return sweep(command._replace(flags={**command.flags, "--multirun": ""}))
    return _run(command, arguments)


def _run(command: "Command", arguments: list[str]) -> int:
    """Run once, or only print the config of it."""
    from omegaconf import OmegaConf

    from harness.config import compose, deepspeed_file
    from harness.config.command_line import split
    from harness.config.load import load, without_hydra

    from_file = deepspeed_file.expanded(arguments)
    cfg = compose.compose(from_file.arguments)
    settings = load(cfg)
    if command.flags.get("--cfg") == "job" and "--package" not in command.flags:
        return _say(OmegaConf.to_yaml(without_hydra(cfg), resolve="--resolve" in command.flags))
    if "--cfg" in command.flags:
        return _by_hydra(split(from_file.arguments))
    _require("run")
    _prepare(cfg.hydra)
    real = settings.world.kind != "rehearsed"
    with watching() if real else nullcontext(Watcher()) as watcher, known(real) as place:
        with without_collection():
            from harness.run import run  # imports torch, so only after the request is checked

        return run(settings, cfg, from_file.arguments, from_file.reasons, watcher, place)


def _by_hydra(command: "Command") -> int:
    """Let Hydra carry out a flag that only prints, on one rank."""
    from harness.config import compose
    from harness.config.command_line import FLAGS, split

    if os.environ.get("RANK", "0") != "0":
        return 0
    if "--shell-completion" in command.flags and any(word.startswith("query=") for word in command.overrides):
        words = os.environ.get("COMP_LINE", "").split(" ")[1:]
        if words[1:] and words[0] in TOOLS:
            return 0  # the shell completes paths
        if words and words[-1].startswith("-"):
            return _say("\n".join(_starting(words[-1], FLAGS)))
        if len(words) < 2:
            print("\n".join(_starting("".join(words), TOOLS)))  # Hydra knows none
        with suppress(Refusal):  # a word that is not complete yet
            configs = {flag: value for flag, value in split(words).flags.items() if "--config" in flag}
            command = command._replace(flags={**configs, **command.flags})
    try:
        compose.through_hydra(command, lambda cfg: None)
    except SystemExit as ended:
        return 0 if ended.code is None else 2
    except ValueError as error:
        return _refuse(str(error))
    return 0


def _starting(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word)]


def _prepare(node: "DictConfig | Mapping[str, Any]") -> None:
    """What Hydra's own keys ask of this process, before it imports what reads the environment."""
    os.environ.update({name: str(value) for name, value in node["job"]["env_set"].items()})
    if verbose := node["verbose"]:
        import logging

        logging.basicConfig(format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s")
        for name in [None] if verbose is True else [verbose] if isinstance(verbose, str) else verbose:
            logging.getLogger(name).setLevel(logging.DEBUG)


def _require(extra: str | None) -> None:
    """Raise Absent where a package of `extra` is not installed."""
    for package in EXTRAS.get(extra or "", ()):
        if find_spec(package) is None:
            raise Absent(f"{package} is not installed; install it with pip install 'harness[{extra}]'")


def _say(text: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(text.rstrip())
    return 0


def _refuse(sentence: str, code: int = 2) -> int:
    """Print one line on stderr, once per node: a file may be missing on one node only. Returns `code`."""
    launcher.report(sentence)
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        print(f"harness: {sentence}", file=sys.stderr)
    return code


def _failed(error: Exception) -> int:
    """Print what an unexpected error says, and the file that has its traceback. Returns the exit code."""
    if type(error).__name__ == "BrokenProcessPool":
        sentence = "a rehearsal's process ended without an error message; was it killed?"
    else:
        sentence = f"unexpected error: {tracebacks.sentence(error)}"
    launcher.report(sentence)
    print(f"harness: {sentence}", file=sys.stderr)
    return 3


def console() -> NoReturn:
    """Run `main`, then end the process without Python's shutdown.

    gloo's threads hold tensors, and freeing one during shutdown aborts the process.
    """
    for stream in (sys.stdout, sys.stderr):  # a model may emit characters that the terminal cannot encode
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("harness: interrupted", file=sys.stderr)
        code = 130  # the shells' code for an interrupt
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if pool := sys.modules.get("harness.rehearsal.pool"):
        pool.end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    console()
