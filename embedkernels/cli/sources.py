"""From what ``--train`` and ``--eval`` say to a table: a file, a directory, or a name of the ``datasets`` package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedkernels.cli import tables
from embedkernels.cli.errors import UsageError, did_you_mean, listed, out_of_memory, siblings
from embedkernels.cli.tables import Table

# Names that evaluation splits go by, the best first.
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


def load(source: str, argument: str, wanted: Mapping[str, str]) -> Table:
    """The columns that ``wanted`` names, from a file or a data set.

    Args:
        source: a file; a directory that ``datasets`` saved or can read; or ``NAME[:CONFIG][:SPLIT]``.
        argument: ``"--train"`` or ``"--eval"``.
        wanted: the column that each argument names, by argument.

    Raises:
        UsageError: there is no such file, format, data set, split or column, there are no rows, or it cannot be read.
    """
    # os.path throughout: a name too long for a path is no file, and no error.
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        if tables.format_of(path) is None:
            raise UsageError(
                f"{argument}: {path}: unknown format {path.suffix or path.name!r}",
                f"Use one of {tables.formats()} (also with .gz), or a name of the datasets package.",
            )
        return tables.read(path, argument, wanted)
    # A data set's name may have a dot too, but then it has an owner: "owner/set.v2".
    path = Path(os.path.expanduser(_parts(source, argument)[0]))
    looks_like_path = source.startswith((".", "~", os.sep)) or (path.suffix and os.path.isdir(path.parent))
    if looks_like_path and not os.path.isdir(path):
        raise _no_file(path, argument)
    return _dataset(source, argument, wanted)


def same(one: Table, other: Table) -> bool:
    """Whether two tables are of the same file, or of the same split of the same data set."""
    paths = [os.path.expanduser(table.name) for table in (one, other)]
    if all(map(os.path.isfile, paths)):
        return os.path.samefile(*paths)
    return os.path.realpath(paths[0]) == os.path.realpath(paths[1])


def evaluation_split(source: str) -> str | None:
    """``NAME:SPLIT`` of the evaluation split that belongs to a data set named without a split; None if none does."""
    if os.path.isfile(os.path.expanduser(source)):
        return None
    name, config, split = _parts(source, "--train")
    if split is not None:
        return None
    found = _open(name, config, "--train")
    known = next((one for one in EVALUATION_SPLITS if one in found), None) if isinstance(found, dict) else None
    return None if known is None else ":".join([name, *([config] if config else []), known])


def _no_file(path: Path, argument: str) -> UsageError:
    folder = path.parent
    if not os.path.isdir(folder):
        return UsageError(f"{argument}: there is no file {path}", f"There is no directory {folder} either.")
    return UsageError(
        f"{argument}: there is no file {path}",
        f"It is looked for in {folder.resolve()}.{did_you_mean(path.name, siblings(path))}",
    )


def _parts(source: str, argument: str) -> tuple[str, str | None, str | None]:
    if os.path.exists(os.path.expanduser(source)):
        return source, None, None
    folder, colon, split = source.rpartition(":")
    if colon and os.path.isdir(os.path.expanduser(folder)):
        return folder, None, split
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UsageError(
            f"{argument}: data set {source!r} has too many parts", "Use NAME, NAME:SPLIT or NAME:CONFIG:SPLIT."
        )
    return name, (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)


def _open(name: str, config: str | None, argument: str) -> Any:
    """The data set: a dict of splits, or one split."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{argument}: there is no file {name}, and data sets need a package that is not installed",
            f'Check the path (formats: {tables.formats()}), or pip install "embedkernels[datasets]".',
        ) from error
    path = Path(os.path.expanduser(name))
    datasets.disable_progress_bars()
    try:
        if any(os.path.isfile(path / file) for file in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if os.path.isdir(path) else name, config)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise UsageError(
            f"{argument}: {name!r} is neither a file nor a data set that can be loaded ({_first_line(error)})",
            f"Check the spelling and the network.{offline}",
        ) from error
    except Exception as error:  # a data set's own code or files may fail in any way
        if out_of_memory(error):
            raise
        raise UsageError(f"{argument}: data set {name!r} does not load: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dataset(source: str, argument: str, wanted: Mapping[str, str]) -> Table:
    name, config, split = _parts(source, argument)
    found = _open(name, config, argument)
    if isinstance(found, dict):
        usual = ("train",) if argument == "--train" else EVALUATION_SPLITS
        chosen = split or next((one for one in usual if one in found), None)
        if chosen is None or chosen not in found:
            what = f"split {split!r}" if split else f"split named {' or '.join(usual)}"
            raise UsageError(
                f"{argument}: data set {name!r} has no {what}",
                f"Splits there: {listed(found)}. Name one: {name}:{next(iter(found))}.",
            )
        found, name = found[chosen], ":".join(filter(None, (name, config, chosen)))
    elif split is not None:
        raise UsageError(f"{argument}: data set {name!r} has no splits", "Leave the split out.")
    for option, column in wanted.items():
        if column not in found.column_names:
            raise tables.missing_column(option, column, name, found.column_names)
    if len(found) == 0:
        raise UsageError(f"{argument}: {name} has no rows")
    return Table(argument, name, {column: _values(found, column) for column in wanted.values()})


def _values(found: Any, column: str) -> list[Any]:
    """A column with class numbers replaced by their names."""
    values = list(found[column])
    feature = found.features[column]
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    if names is None:
        return values

    def name_of(number: Any) -> Any:
        return names[number] if isinstance(number, int) and 0 <= number < len(names) else None

    if inner is feature:
        return [name_of(value) for value in values]
    return [None if value is None else [name_of(one) for one in value] for value in values]
