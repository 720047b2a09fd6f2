"""What all command lines share: a user's mistake ends with one message on stderr and exit status 2."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""What the package raises for what a user can put right. Anything else is a defect and keeps its traceback."""


class UserError(click.ClickException):
    """A user's mistake; click prints ``Error: <message>`` and ends with exit status 2."""

    exit_code = 2


class OrderedCommand(click.Command):
    """A command that remembers in which order its options were given: ``ctx.obj``, their names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and note the order."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.obj = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


def user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors of `USER_ERRORS` that a command raises into a message and exit status 2.

    Stands below ``@click.command()`` and its options, next to the function::

        @click.command()
        @click.argument("dataset")
        @user_errors
        def main(dataset: str) -> None: ...

    The traceback goes to the log at debug level.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except USER_ERRORS as error:
            logger.debug("traceback of the error reported to the user", exc_info=True)
            raise UserError(error_message(error)) from error

    return wrapped


def error_message(error: BaseException) -> str:
    """Return the message of an exception for people; that of the operating system begins with the file's name."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
