"""Every error famexport raises on purpose, and the exit code the command line gives it.

    FamExportError                     1  anything else
    |-- UsageError                     2  a path that does not exist, an option that cannot be
    |-- InvalidInputError              3  damaged or unacceptable input
    |   |-- ConfigError                     a model configuration
    |   |   `-- UnsupportedModelError       an architecture or option famexport does not implement
    |   |-- CheckpointError                 a checkpoint directory or its tensors
    |   |-- BundleError                     a bundle: manifest, hashes, file names
    |   |-- SnapshotError                   a saved state: damaged, or of another model
    |   `-- ContractError                   a call whose tensors break the step contract
    |-- BackpressureError              1  a queue is full: take what is ready first
    |-- UntrustedError                 4  code or an engine nobody vouched for
    |-- IncompatibleError              5  wrong device or version
    |   `-- MissingDependencyError          a package that is not installed
    `-- NumericError                   6  not the numbers that were asked for
        |-- ParityError
        |-- NonFiniteError
        `-- EngineError                     an engine whose types or kernels are not what was asked for

A message says what was got, what was expected and what to type next. Foreign exceptions are mapped with ``from exc``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def first_line(exc: BaseException, limit: int = 500) -> str:
    """What a foreign exception says, or its name where it says nothing."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:limit]


class FamExportError(Exception):
    """Base of all errors raised by famexport. ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(FamExportError):
    exit_code = 2


class InvalidInputError(FamExportError):
    exit_code = 3


class ConfigError(InvalidInputError):
    pass


class UnsupportedModelError(ConfigError):
    pass


class CheckpointError(InvalidInputError):
    pass


class BundleError(InvalidInputError):
    pass


class SnapshotError(InvalidInputError):
    pass


class ContractError(InvalidInputError):
    pass


class BackpressureError(FamExportError):
    pass


class UntrustedError(FamExportError):
    exit_code = 4


class IncompatibleError(FamExportError):
    exit_code = 5


class MissingDependencyError(IncompatibleError):
    """A package that an extra installs is missing; ``extra`` names the extra."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: pip install 'famexport[{extra}]'")
        self.package, self.extra = package, extra


class NumericError(FamExportError):
    exit_code = 6


class ParityError(NumericError):
    pass


class NonFiniteError(NumericError):
    pass


class EngineError(NumericError):
    pass


def raise_problems(error: type[FamExportError], subject: str, problems: Sequence[str]) -> None:
    """Raise one error naming all problems found in ``subject``; do nothing where there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"{subject}: {problems[0]}")
    raise error(f"{subject}: {len(problems)} problems: " + "; ".join(problems))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """For scripts: an error of famexport's ends them with one line on stderr, and the code that the CLI gives it."""
    try:
        yield
    except FamExportError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
