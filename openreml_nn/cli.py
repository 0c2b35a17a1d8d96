"""The command line: ``openreml-nn fit|validate|predict --config model.yaml``, on LightningCLI.

``openreml-nn network fit|validate|predict|refit`` is for a network with random effects (`MixedModelRegressor`).
The exit code is 0 after a fit that converged, 1 for a mistake in the data or the model or a file that cannot be
written, 2 for a mistake in the options, 3 after a fit that did not converge, whose results are written all the same,
130 after Ctrl-C and 143 after SIGTERM. A mistake is one line on stderr; with the environment variable
``OPENREML_NN_DEBUG`` set to anything, it is a traceback.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.exceptions import SIGTERMException

from openreml_nn.lightning.commands import REMLCLI, Commands, NetworkCLI
from openreml_nn.solvers import processes
from openreml_nn.solvers.memory import ADVICE
from openreml_nn.solvers.ranks import DistNetworkError

# The parts of jsonargparse's messages
_NO_TYPE = "Does not validate against any of the Union subtypes"
_KEY = re.compile(r'Parser key "([^"]*)"')
_OPTION = re.compile(r"Option '([^']*)' is not accepted")
_CLASS_PATH = re.compile(r"class_path'?[:=]? ?'([\w.]+)'")
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")
_REQUIRED = re.compile(r"arguments are required: .*")
_COMMAND = re.compile(r"\b(?:fit|validate|predict|refit)\.")
_PREFIX = re.compile(r"^Type .* expects a function or a callable class: ")
_FRAME = re.compile(
    r"$|Does not validate|Subtypes:|Errors:|Given value|Parser key|Problem with given class_path|Expected a path but"
    r"|Expected a <class '\w+'>$|Import path .* subclass of|.* to be a subclass of"
)
_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes|not enough memory|out of memory")
_PEER = re.compile(r"Connection (reset|closed) by peer|Connection refused")  # of a message between processes
DEBUG = "OPENREML_NN_DEBUG"
NOT_CONVERGED, INTERRUPTED, TERMINATED = 3, 130, 143
HELP = (
    "Linear mixed models by restricted maximum likelihood; `openreml-nn network fit|validate|predict|refit` is for a "
    "network with random effects. Exit codes: 0 done, 1 a mistake in the data or the model, 2 one in the options, "
    f"{NOT_CONVERGED} a fit that did not converge, whose results are written all the same, {INTERRUPTED} Ctrl-C, "
    f"{TERMINATED} SIGTERM."
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; classes of files in the present folder are found too.

    Args:
        args: The command and its options; those of the process when left out.

    Raises:
        SystemExit: With code 2 for a mistake in the options, 1 for one in the data, the model or the files, 3 where a
            fit did not converge, 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = sys.argv[1:] if args is None else list(args)
    if not {"", os.getcwd()} & set(sys.path):  # a console script has its own folder there
        sys.path.append(os.getcwd())
    kind = NetworkCLI if given[:1] == ["network"] else REMLCLI
    parser = {"exit_on_error": False, "description": HELP}
    with quiet():
        try:
            cli = kind(
                args=given[1:] if kind is NetworkCLI else given,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                parser_kwargs=dict.fromkeys(kind.subcommands(), parser) | parser,
            )
        except Exception as error:
            if os.environ.get(DEBUG) or not is_mistake(error):
                raise
            if not _told_elsewhere(error):
                print(f"openreml-nn: error: {message(error, kind)}", file=sys.stderr)
            end_children()
            raise SystemExit(2 if isinstance(error, ArgumentError) else 1) from None
        except KeyboardInterrupt:  # before or after the Trainer, which makes it a SystemExit
            raise SystemExit(INTERRUPTED) from None
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise SystemExit(INTERRUPTED) from None
            raise
    if kind is REMLCLI and cli.subcommand == "fit" and not cli.model.converged:
        raise SystemExit(NOT_CONVERGED)


def end_children(seconds: float = 5.0) -> None:
    """End the processes that this one has started and that wait for it, after some seconds to do so themselves."""
    _, waiting = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=seconds)
    for process in waiting:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_mistake(error: BaseException) -> bool:
    """Whether an error is one of the user, raised on purpose by this package, and not a defect of a program."""
    if isinstance(error, (ArgumentError, MemoryError, MisconfigurationException, DistNetworkError)):
        return True
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno is not None):
        return True
    if _PEER.search(str(error)) or _out_of_memory(error):
        return True
    if not isinstance(error, (ValueError, KeyError, TypeError)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise")
    return own or _NO_TYPE in str(error)


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory was not there, of which torch tells in a RuntimeError."""
    told = isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(told)


def _told_elsewhere(error: BaseException) -> bool:
    """Whether the first of several processes tells an error: they find mistakes in data and model together."""
    return processes().rank > 0 and not _out_of_memory(error)


def message(error: BaseException, kind: type[Commands] = REMLCLI) -> str:
    """What an error says, on one line; a KeyError without its quotes, and where no type fits, what is wrong."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    told = _what_is_wrong(text) if _NO_TYPE in text else text
    if _PEER.search(text):
        told = f"another process of this fit has ended before it was through ({text.partition('. ')[0]})"
    if isinstance(error, RuntimeError) and (short := _MEMORY.search(text)):
        size = f": {int(short[1]) / 2**30:.1f} GiB more were asked for" if short[1] else f" ({text.partition('. ')[0]})"
        told = f"the memory is not enough for this fit{size}. {ADVICE}"
    if isinstance(error, ArgumentError):
        told = _REQUIRED.sub(lambda found: _COMMAND.sub("--", found[0]), told)
        unknown = _UNKNOWN.search(told)
        near = nearest_option(unknown[1] or unknown[2], kind) if unknown else None
        told += f"; did you mean {near!r}?" if near else ""
    return " ".join(told.split())


def nearest_option(name: str, kind: type[Commands] = REMLCLI) -> str | None:
    """The option of a command that an unknown one looks like; a part of it for nested ones, None where there is none.

    Example:
        >>> from openreml_nn.cli import nearest_option
        >>> nearest_option("data.fixd"), nearest_option("dta.random.gen")
        ('data.fixed', 'data')
    """
    groups = kind.parts()
    first, *rest = name.split(".")
    if first in groups and rest:
        near = get_close_matches(rest[0], signature(groups[first]).parameters, 1)
        return f"{first}.{near[0]}" if near else None
    near = get_close_matches(first, [*groups, "config", "ckpt_path", "seed_everything"], 1)
    return near[0] if near and near[0] != first else None


def _what_is_wrong(text: str) -> str:
    """The informative lines of jsonargparse's report on a value that none of several types takes."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    reasons = [_PREFIX.sub("", line).split(" Got value: Namespace")[0] for line in lines if not _FRAME.match(line)]
    if not reasons:
        reasons = ["no accepted type fits " + next(line for line in lines if line.startswith("Given value: "))[13:]]
    options = [option for path in _CLASS_PATH.findall(text) for option in _options(path)]
    told = []
    for reason in dict.fromkeys(reasons):
        unknown = _OPTION.search(reason)
        near = get_close_matches(unknown[1], options, 1) if unknown else []
        told.append(f"{reason.removesuffix('.')}; did you mean {near[0]!r}?" if near else reason)
    key = ".".join(_KEY.findall(text))
    return (f"In `{key}`: " if key else "") + "; ".join(told)


def _options(path: str) -> list[str]:
    """Arguments of the class at an import path, none where there is no such class."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name, None) if module.startswith("openreml_nn") else None
    return list(signature(kind).parameters) if kind is not None else []


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without hints and advertisements, and warnings as one line each."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    if getattr(rank_zero_only, "rank", 0):  # the first of several processes tells what all of them see
        logging.getLogger("openreml_nn").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", PossibleUserWarning)
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # `main` in a program of its own
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # each command has a log folder of its own
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            yield
        finally:
            log.setLevel(level)


def _show_warning(text: Any, *where: Any, file: Any = None, **more: Any) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0:  # of several processes
        print(f"openreml-nn: warning: {' '.join(str(text).split())}", file=file or sys.stderr)
