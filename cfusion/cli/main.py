"""The command `cfusion`: its subcommands, and how errors become messages and exit codes.

Modules here import nothing heavy at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

import typer

import cfusion
from cfusion.cli import (
    cmd_baseline,
    cmd_checkpoint,
    cmd_configs,
    cmd_demo,
    cmd_doctor,
    cmd_evidence,
    cmd_explain,
    cmd_gdc,
    cmd_help,
    cmd_init,
    cmd_launch,
    cmd_mcp,
    cmd_predict,
    cmd_preprocess,
    cmd_registry,
    cmd_reproduce,
    cmd_sweep,
    cmd_train,
    cmd_view,
)  # fmt: skip
from cfusion.console import RepeatsCounted, ToTerminal, is_rank_zero
from cfusion.errors import DISK, CfusionError, ExchangeError, RequeueError
from cfusion.secret_text import SecretsLeftOut, without_secrets

HELP = """Survival prediction from whole-slide images, from slides to numbers a reviewer can trust.

\b
The five commands most people need, each with an example:
  cfusion demo                                       each step on drawn slides
  cfusion preprocess slides/ --store features        slides to embeddings
  cfusion preprocess shard features --out shards     embeddings to shards
  cfusion train study.yaml data.shards=shards        cross-validate, report
  cfusion explain a.svs --model runs/study --out ex  explain a risk

\b
Then: `init` writes study.yaml for features you have, `view` shows slides and
heatmaps, `predict` scores new patients, `score` anyone's predictions, `sweep`
compares models. COMMAND --help has an example, and `cfusion help TOPIC`
explains an error.

\b
Exit codes:
  0: done
  2: invalid input
  3: finished, but some items failed (listed)
  75: stopped on request, state saved; run the same command again to resume
"""

SECONDS_FOR_RANK_0 = 5.0
"""How long another process waits before it reports an error that rank 0 may have too."""

SECONDS_FOR_THE_CAUSE = 0.5
"""How long a process waits before it exits because another process has ended."""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cmd_preprocess.app, name="preprocess")
app.add_typer(cmd_gdc.app, name="gdc")
app.add_typer(cmd_configs.app, name="configs")
COMMANDS = (
    cmd_demo, cmd_doctor, cmd_init, cmd_baseline, cmd_train, cmd_checkpoint, cmd_predict, cmd_launch, cmd_sweep,
    cmd_evidence, cmd_registry, cmd_reproduce, cmd_explain, cmd_view, cmd_mcp, cmd_help,
)  # fmt: skip
for module in COMMANDS:
    module.register(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cfusion {cfusion.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log every step."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Log warnings only."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    rank_zero = is_rank_zero()
    level = logging.DEBUG if verbose else logging.WARNING if quiet or not rank_zero else logging.INFO
    to_terminal = ToTerminal()
    to_terminal.setFormatter(SecretsLeftOut("%(message)s"))
    if not verbose:
        to_terminal.addFilter(RepeatsCounted())
    logging.basicConfig(level=logging.WARNING, handlers=[to_terminal], force=True)
    for name in ("cfusion", "preprocess", "launch"):
        logging.getLogger(name).setLevel(level)


def run() -> None:
    """Run the command line; errors a user can act on become one line and an exit code."""
    try:
        app()
    except CfusionError as error:
        _end(error)
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror}. {DISK[error.errno]}\n")
        sys.exit(CfusionError.exit_code)
    except SystemExit as left:
        # Typer has turned Ctrl-C into this code.
        if left.code == 130:
            sys.stderr.write("interrupted; run the same command again to resume\n")
        raise
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from cfusion.training.connection import exchange_error, record_cause

        found = exchange_error(error)
        if found is None:
            record_cause(f"{type(error).__name__}: {error}")
            raise
        logging.getLogger("cfusion").debug("the error of the library:", exc_info=error)
        _end(found)
    finally:
        _count_repeats()


def _count_repeats() -> None:
    """Print how often the warnings were repeated that the terminal showed once."""
    filters = [each for handler in logging.getLogger().handlers for each in handler.filters]
    for counted in filters:
        if isinstance(counted, RepeatsCounted):
            for line in counted.lines():
                sys.stderr.write(f"{without_secrets(line)}\n")


def _end(error: CfusionError) -> NoReturn:
    """Report an error on one line, and exit with its code; the first cause of several processes is the last line."""
    text = without_secrets(str(error))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from cfusion.training.connection import record_cause

        if isinstance(error, ExchangeError) and error.consequence:
            time.sleep(SECONDS_FOR_THE_CAUSE)  # the launcher then sees the end of the other process first
            sys.stderr.write(f"{text} This one exits too.\n")
            sys.exit(error.exit_code)
        record_cause(text)
        if not is_rank_zero():
            _let_rank_0_speak(error)
    sys.stderr.write(f"error: {text}\n       explained by: cfusion help {error.topic}\n")
    sys.exit(error.exit_code)


def _let_rank_0_speak(error: CfusionError) -> None:
    """Give rank 0 time to report an error that all processes have; the launcher then ends the other processes."""
    if isinstance(error, RequeueError):
        sys.exit(error.exit_code)
    if isinstance(error, ExchangeError):
        return  # of this process; rank 0 has another
    time.sleep(SECONDS_FOR_RANK_0)
