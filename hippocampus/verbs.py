"""What the command-line verbs share: flags, overrides, and errors as one line with a hint."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hippocampus import distributed, xla_flags
from hippocampus.compilation_cache import use_compilation_cache
from hippocampus.errors import (
    EXIT_BUG,
    EXIT_OK,
    ConfigError,
    HippocampusError,
    OutOfMemoryError,
    Stopped,
)
from hippocampus.runs.redact import redact


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `ConfigError`s and whose flags are never abbreviated."""

    def __init__(self, verb: str, description: str):
        """A parser for `python -m hippocampus.<verb>`."""
        super().__init__(prog=f"python -m hippocampus.{verb}", description=description,
                         allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of errors")

    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting."""
        raise ConfigError(message, f"{self.prog} --help")


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.a.b=c` (or `--config.a.b c`) from the other arguments.

    Raises:
      ConfigError: an override without a value.
    """
    others, overrides = [], {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--config.{name} has no value", f"--config.{name}=VALUE")
            value = queue.pop(0)
        overrides[name] = value
    return others, overrides


def run_verb(main: Callable[[Sequence[str]], Any], arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and ends the process with the exit code of what happened.

    Of several processes (hippocampus.distributed) one says why they end, and all end with its
    exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    warnings.showwarning = _show_warning
    use_compilation_cache()
    xla_flags.python_calls(0)
    try:
        main(arguments)
        distributed.finish()
    except Stopped as error:  # all processes are here, at the same step
        if distributed.is_first():
            _report(error, debug)
        distributed.finish()
        sys.exit(error.exit_code)
    except HippocampusError as error:
        _end(error, debug)
    except KeyboardInterrupt:  # outside the loop, where there is nothing to save
        _end(Stopped("interrupted", "start the same command again"), debug)
    except Exception as error:
        known = _out_of_memory(error) or _no_device(error)
        if known is not None:
            _end(known, debug)
        if distributed.is_several():  # where nothing else could end the others
            if distributed.report_failure(EXIT_BUG):
                traceback.print_exception(error)
            distributed.leave_failed(EXIT_BUG)
        raise
    sys.exit(EXIT_OK)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """One line; only a warning that is not ours says where it comes from."""
    ours = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent)
    text = f"warning: {message}\n" if ours else warnings.formatwarning(
        message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def _end(error: HippocampusError, debug: bool) -> NoReturn:
    code = error.exit_code or EXIT_BUG
    if distributed.report_failure(code):
        _report(error, debug)
    distributed.leave_failed(code)
    sys.exit(code)


def _report(error: HippocampusError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    kind = "stopped" if isinstance(error, Stopped) else "error"
    sys.stdout.flush()
    message = redact(error.message)  # a flag that is refused may hold a secret
    sys.stderr.write(f"{kind}: {message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))


def _out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """JAX reports a full device by the text of a RuntimeError."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return OutOfMemoryError(
            f"out of memory: {(text.splitlines() or ['the host has none left'])[0][:200]}",
            "lower train.batch_size (or raise train.grad_accumulation), data.context or "
            "model.d_model, or set model.remat=full")
    return None


def _no_device(error: BaseException) -> ConfigError | None:
    """JAX reports a platform that it cannot start by a RuntimeError, or by a failed assertion."""
    calls = traceback.extract_tb(error.__traceback__)
    if not calls or not calls[-1].filename.endswith("xla_bridge.py"):
        return None
    wanted = os.environ.get("JAX_PLATFORMS", "")
    why = str(error).partition(" (set JAX_PLATFORMS")[0].strip()
    asked = f"JAX_PLATFORMS={wanted}, " if wanted else ""
    return ConfigError(
        f"no device: {asked}{why or 'and this installation of JAX has no such platform'}",
        "unset JAX_PLATFORMS to run on what is there; what JAX needs for an accelerator comes with "
        "pip install 'hippocampus[cuda12]', [cuda13] or [tpu]")
