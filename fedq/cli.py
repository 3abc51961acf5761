"""The command line of `train.py`, `train_resnet50.py` and `fedq`: flags over a YAML file over defaults.

What the settings mean lives in `fedq.config`; the work is done by `fedq.trainers`, imported only once the settings are
known to be good.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from fedq.config import Config, validate
from fedq.configfile import load_config, load_deepspeed_config, with_old_flags, with_settings
from fedq.data import DataError
from fedq.engines.accelerate_engine import accelerate_settings
from fedq.errors import DivergedError, FieldError, RunStopped
from fedq.files import describe, is_of_disk
from fedq.old_settings import OLD
from fedq.report.encoding import make_readable
from fedq.runtime import Ranks, check_lone_process, detect, lasting_streams, without_local_rank

_DEFAULTS = Config()
_DEEPSPEED_CONFIG = Path("deepspeed_config.json")

_FIRST_FLAGS = {
    "--dataset": "cifar10, mnist, digits, or a folder of images or Parquet",
    "--model": "resnet18, resnet50, cnn62k, ..., or package.module:function",
    "--num-clients": "clients that the images are dealt to",
    "--rounds": "how often clients train and the server averages",
    "--lr": "learning rate of the clients",
    "--uplink": "codec of what clients send: fp32, int8, int4, sign, topk:density=0.01, ...",
    "--downlink": "codec of what the server sends back",
    "--out": "folder of the run: model, metrics, counted bytes",
}
"""Flags that a newcomer needs, with their help; help begins with them."""

# A launcher ends all ranks when one fails; a silent rank that is early waits this long, so that the other can speak.
_GRACE_S = 5.0


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class _Arguments(Generic[C]):
    """Train a model on federated clients that send packed few-bit updates, and count every byte."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")]
    """Settings as a run's config.yaml has them; flags go over them."""
    job: Annotated[C, tyro.conf.arg(name="")]


def parse_args(
    argv: Sequence[str], *, defaults: C, is_heard: bool = True, program: str | None = None, words: str | None = None
) -> C:
    """Read the settings from the command line, over those of `--deepspeed-config`, of `--config`, and `defaults`.

    Args:
        argv: Arguments without the program's name.
        defaults: Settings that neither a flag nor a file gives.
        is_heard: Whether help and errors are printed; False on all ranks but the first.
        program: Name of the program in help and errors. Default: the process's own.
        words: Words for what the program does, in help. Default: those of a training job.

    Returns:
        The settings, not yet validated.

    Raises:
        FieldError: A file cannot be used.
        SystemExit: Help was asked for (code 0), or a flag or its value is wrong (code 2).
    """
    # The file is wanted before the flags are parsed, because it changes their defaults and so what --help shows.
    # nargs="?": that the value is missing is for the second parser to tell.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, nargs="?")
    early.add_argument("--resume", type=Path, nargs="?")
    early.add_argument("--deepspeed-config", "--deepspeed_config", type=Path, nargs="?")
    given = early.parse_known_args(argv)[0]
    path = given.config
    if path is None and given.resume is not None:
        path = given.resume / "config.yaml"
    program = program or Path(sys.argv[0]).name
    # Not tyro's console_outputs=False: with it, 1.0.17 still prints that a value does not parse.
    with ExitStack() as silence:
        if not is_heard:
            silence.enter_context(redirect_stdout(io.StringIO()))
            silence.enter_context(redirect_stderr(io.StringIO()))
        job = _from_files(path, given.deepspeed_config, defaults)
        old, argv = _old_flags(argv)
        marks = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction)
        kind: Any = _Arguments.__class_getitem__(type(defaults))  # type: ignore[attr-defined]
        both: _Arguments[C] = tyro.cli(
            kind, prog=program, description=_introduction(words), args=argv, default=_Arguments(path, job), config=marks
        )
        return with_old_flags(both.job, old)


def _introduction(words: str | None) -> str:
    """Return what help begins with: what the program is for, and the flags to begin with."""
    width = max(map(len, _FIRST_FLAGS))
    first = [f"  {flag:<{width}}  {what}" for flag, what in _FIRST_FLAGS.items()]
    return "\n".join([words or str(_Arguments.__doc__), "", "To begin with:", *first, "", "All flags:"])


def _old_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the values of flags of earlier versions, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OLD:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, default=argparse.SUPPRESS)
    found, others = parser.parse_known_args(argv)
    return vars(found), others


def _of_launcher(launcher: str, defaults: Config) -> Config:
    """Return the defaults with what the launcher brings along: a configuration file, or variables."""
    if launcher == "deepspeed" and _DEEPSPEED_CONFIG.is_file():
        return replace(defaults, run=replace(defaults.run, deepspeed_config=_DEEPSPEED_CONFIG))
    if launcher == "accelerate":
        return with_settings(defaults, accelerate_settings(os.environ))
    return defaults


def _from_files(path: Path | None, deepspeed_path: Path | None, defaults: C) -> C:
    """Return the settings of a YAML file and a DeepSpeed file.

    A DeepSpeed file that a flag names goes over the YAML file. One that the YAML file or the defaults name goes under
    it, because a run's config.yaml holds everything that was decided then.
    """
    config = defaults if path is None else load_config(path, defaults)
    if deepspeed_path is not None:
        return load_deepspeed_config(deepspeed_path, config)
    if config.run.deepspeed_config is None:
        return config
    under = load_deepspeed_config(config.run.deepspeed_config, defaults)
    return under if path is None else load_config(path, under)


def main(argv: Sequence[str] | None = None, *, defaults: Config = _DEFAULTS) -> int:
    """Run the job that the command line describes.

    Settings and data that cannot be used are told in one line on stderr, without a traceback: those seen before any
    work by rank 0 alone, those seen during it (data missing on one machine) by the first rank of a machine. Any other
    exception keeps its traceback and names the rank. Where nobody reads standard output or error any more, the job goes
    on all the same.

    Args:
        argv: Arguments without the program's name. Default: the process's own.
        defaults: Settings that neither a flag nor the file gives.

    Returns:
        The exit code: 0; 2 for settings or data that cannot be used; 1 for a run that could not go on (a full disk, a
        model that has diverged, ranks that did not meet); 130 after Ctrl-C.
    """
    make_readable()
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # of a script that was importing until now
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting_streams():
        try:
            return _main(sys.argv[1:] if argv is None else argv, defaults)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is impatient should not interrupt the end
            print("stopped by SIGINT", file=sys.stderr)
            return 128 + signal.SIGINT


def _main(argv: Sequence[str], defaults: Config) -> int:
    if argv and argv[0] in _COMMANDS:
        return _command(argv[0], argv[1:])
    try:
        ranks = detect(os.environ)
        check_lone_process(ranks, os.environ)
    except FieldError as error:  # nobody knows which rank it is
        return _refuse(error, "error")
    is_root = ranks.rank == 0
    try:
        defaults = _of_launcher(ranks.launcher, defaults)
        config = parse_args(without_local_rank(argv, os.environ), defaults=defaults, is_heard=is_root)
        validate(config)
    except FieldError as error:
        return _refuse(error, "error" if is_root else None)
    except SystemExit as stop:
        if stop.code and not is_root:
            time.sleep(_GRACE_S)
        raise
    return _run(config, ranks)


def _command(name: str, argv: Sequence[str]) -> int:
    """Do what is no training: one of `_COMMANDS`, as `fedq NAME`."""
    try:
        return _COMMANDS[name](argv, f"{Path(sys.argv[0]).name} {name}")
    except (FieldError, DataError) as error:
        return _refuse(error, "error")
    except RunStopped as stop:
        return _stopped(stop, "error")
    except OSError as error:
        if not is_of_disk(error):
            raise
        return _stopped(RunStopped(f"what {name} writes cannot be written ({describe(error)})"), "error")


def _list_runs(argv: Sequence[str], program: str) -> int:
    """List runs and how far they are: `fedq runs [FOLDER ...]`; with --compare, accuracy, bytes and time of each."""
    from fedq.report import comparison, find_runs, print_runs

    parser = argparse.ArgumentParser(prog=program, description=_list_runs.__doc__)
    parser.add_argument("folder", type=Path, nargs="*", default=[Path("runs")], help="a run, or a folder of runs")
    parser.add_argument("--compare", action="store_true", help="print one Markdown table of results instead")
    given = parser.parse_args(argv)
    runs = find_runs(given.folder)
    if given.compare:
        print(comparison(runs))
    else:
        print_runs(runs)
    return 0


def _draw_figures(argv: Sequence[str], program: str) -> int:
    """Draw what finished runs show of few-bit models, as PNG, SVG and CSV: `fedq figures RUN [RUN ...] --out DIR`."""
    from fedq.report.figures import write_figures
    from fedq.report.runs import find_runs

    parser = argparse.ArgumentParser(prog=program, description=_draw_figures.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a run, or a folder of runs")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where the files go")
    given = parser.parse_args(argv)
    print("\n".join(write_figures([run.path for run in find_runs(given.folder)], given.out)))
    return 0


def _report(argv: Sequence[str], program: str) -> int:
    """Write one HTML page of runs, with tables, figures and text: `fedq report RUN [RUN ...] --out DIR`."""
    from fedq.report.page import write_report

    parser = argparse.ArgumentParser(prog=program, description=_report.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a run, or a folder of runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the files go")
    parser.add_argument("--title", help="title of the page")
    given = parser.parse_args(argv)
    files = write_report(given.folder, given.out, title=given.title)
    print(files.text.read_text(encoding="utf-8"))
    print(f"{files.page}, beside it {len(files.tables)} tables and {len(files.figures)} pictures")
    return 0


def _examine(argv: Sequence[str], program: str) -> int:
    """Say what this machine offers, what serves, and what is missing: `fedq doctor`."""
    from fedq.doctor import main as examine

    argparse.ArgumentParser(prog=program, description=_examine.__doc__).parse_args(argv)
    return examine()


def _convert(argv: Sequence[str], program: str) -> int:
    from fedq.convert import main as convert

    convert(argv, program)
    return 0


def _inspect(argv: Sequence[str], program: str) -> int:
    from fedq.inspection import main as inspect

    inspect(argv, program)
    return 0


def _sweep(argv: Sequence[str], program: str) -> int:
    from fedq.sweep.command import main as sweep

    return sweep(argv, program, lambda flags: validate(parse_args(flags, defaults=_DEFAULTS)))


def _plan(argv: Sequence[str], program: str) -> int:
    from fedq.planning.command import plan

    return plan(argv, program)


def _probe(argv: Sequence[str], program: str) -> int:
    from fedq.planning.command import probe

    return probe(argv, program)


def _certs(argv: Sequence[str], program: str) -> int:
    from fedq.network.certs import main as certs

    return certs(argv, program)


def _server(argv: Sequence[str], program: str) -> int:
    """Serve a federation across a network; train with the clients that come."""
    from fedq.network.server import run_server
    from fedq.network.settings import SERVER_DEFAULTS, check_server, resolved, short_forms

    words = "Serve a federation: --clients N is short for --num-clients, --quantization [BITS] for --uplink intBITS."
    config = resolved(parse_args(short_forms(argv), defaults=SERVER_DEFAULTS, program=program, words=words))
    check_server(config)
    run_server(config)
    return 0


def _client(argv: Sequence[str], program: str) -> int:
    """Take part in a federation as one client, on one rank or several."""
    from fedq.network.client import run_client
    from fedq.network.settings import ClientConfig, check_client

    config = tyro.cli(ClientConfig, prog=program, description=_client.__doc__, args=argv)
    check_client(config)
    return 1 if "stopped" in run_client(config) else 0


_COMMANDS = {
    "certs": _certs,
    "client": _client,
    "server": _server,
    "sweep": _sweep,
    "runs": _list_runs,
    "report": _report,
    "doctor": _examine,
    "figures": _draw_figures,
    "convert": _convert,
    "inspect": _inspect,
    "plan": _plan,
    "probe": _probe,
}


def _run(config: Config, ranks: Ranks) -> int:
    from fedq.trainers.run import run_job
    from fedq.trainers.starts import is_of_lost_rank

    try:
        run_job(config)
    except (FieldError, DataError) as error:
        if ranks.local_rank == 0:
            return _refuse(error, "error" if ranks.rank == 0 else f"error on rank {ranks.rank}")
        return _refuse(error, None)
    except DivergedError as error:
        return _stopped(error, "error" if ranks.rank == 0 else None)
    except RunStopped as stop:
        return _stopped(stop, "error" if ranks.rank == 0 else f"error on rank {ranks.rank}")
    except Exception as error:
        if ranks.world_size > 1:
            print(f"rank {ranks.rank} of {ranks.world_size} failed: {type(error).__name__}: {error}", file=sys.stderr)
        if is_of_lost_rank(error):  # which has told its own error
            return 1
        raise
    return 0


def _stopped(stop: RunStopped, heading: str | None) -> int:
    """Say why a run could not go on, unless another rank says it, and return the exit code."""
    _say(stop, heading)
    return 1


def _refuse(error: FieldError | DataError, heading: str | None) -> int:
    """Say what is wrong with the settings or the data, unless another rank says it, and return the exit code."""
    _say(error, heading)
    return 2


def _say(error: Exception, heading: str | None) -> None:
    """Print a line, or leave the time for another rank to do so."""
    if heading is None:
        time.sleep(_GRACE_S)
    else:
        print(f"{heading}: {error}", file=sys.stderr, flush=True)
