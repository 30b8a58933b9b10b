"""`perfusion fit | fit-many | generate | sweep | info | push | pull | search`, for people who write no Python."""

import argparse
import sys
from collections.abc import Sequence

from .drawing import add_generate_arguments, add_sweep_arguments, generate, sweep
from .fitting import add_fit_arguments, add_fit_many_arguments, fit, fit_many
from .sharing import (
    add_info_arguments,
    add_pull_arguments,
    add_push_arguments,
    add_search_arguments,
    info,
    pull,
    push,
    search,
)

__all__ = ["add_fit_arguments", "fit", "main"]

INTERRUPTED = 130

_COMMANDS = {
    "fit": (fit, add_fit_arguments, "Fit a concept to a folder of pictures."),
    "fit-many": (fit_many, add_fit_many_arguments, "Fit a table of concepts, one after the other or in processes."),
    "generate": (generate, add_generate_arguments, "Draw prompts with concepts."),
    "sweep": (sweep, add_sweep_arguments, "Find the best bias and temperature of a concept."),
    "info": (info, add_info_arguments, "Show what is in a concept file, without a model."),
    "push": (push, add_push_arguments, "Share a concept file on the Hub."),
    "pull": (pull, add_pull_arguments, "Copy a concept file from the Hub."),
    "search": (search, add_search_arguments, "List concepts on the Hub."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for bad input (one sentence on stderr) or 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="perfusion", description="Personalise a text-to-image model with Perfusion.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (run, add_arguments, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in argv[:1]:  # the flags of a fit need the packages that a fit needs
            try:
                add_arguments(command)
            except ImportError as error:
                print(f"perfusion: {error}; install diffusers_perfusion[train]", file=sys.stderr)
                return 1
        command.set_defaults(run=run)
    arguments = vars(parser.parse_args(argv))
    run = arguments.pop("run")
    try:
        run(**arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        # Errors of the libraries have several lines.
        print(f"perfusion: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
