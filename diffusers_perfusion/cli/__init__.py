"""The command line: `perfusion train | generate | sweep | info | push | pull | search`."""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

INTERRUPTED = 130

# Each command has a module with `add_<command>_arguments(parser)` and a function of its name. The module is imported
# when the command is given, and imports torch and diffusers inside the function: they take seconds.
_COMMANDS = {
    "train": ("train", "Train a concept, or a table of concepts, on images of a subject."),
    "generate": ("generate", "Generate images with concepts."),
    "sweep": ("sweep", "Find the best bias, temperature and checkpoint of a concept."),
    "info": ("sharing", "Show the description in a concept file, without loading a model."),
    "push": ("sharing", "Push a concept file to the Hub."),
    "pull": ("sharing", "Download a concept file from the Hub."),
    "search": ("sharing", "List concepts on the Hub."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 for bad input (with one sentence on stderr) or 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="perfusion",
        description="Personalise a text-to-image model with Perfusion.",
        epilog="`perfusion COMMAND --help` lists the flags of a command, with an example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command, run = parser, None
    for name, (module, help) in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in argv[:1]:
            functions = import_module(f".{module}", __name__)
            command, run = subparser, getattr(functions, name)
            getattr(functions, f"add_{name}_arguments")(subparser)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    assert run is not None  # argparse exits unless a command is given
    if isinstance(sys.stdout, io.TextIOWrapper):
        # When the work is done, a name that the terminal cannot show is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(**vars(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        from ..concept_file import printable

        # Errors of the libraries have several lines, and may quote a stranger's file or server.
        print(f"perfusion: {printable(error, 2000)}", file=sys.stderr)
        return 1
    return 0
