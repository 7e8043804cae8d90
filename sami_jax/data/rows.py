"""Rows of local files, as JSON lines and parquet have them: one after the other, each with the place it came from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sami_jax.errors import BadDataError
from sami_jax.files import iterate_jsonl

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
Row = tuple[str, Any]  # "FILE, line 7", and what stands there
_BATCH_ROWS = 512  # of a parquet file that are in memory together
_BUFFER_BYTES = 1 << 20  # of a parquet column that are read at once; without it, a whole row group's


def find_files(place: Path, subfolder: str = "") -> list[Path]:
    """The files that hold the rows of a data set: the file itself, or those of a folder, in order of their names.

    Of a folder that has a subfolder of this name, as a copy of a whole Hub repository does, that one is taken; where
    files are for training and others are not, those for training.

    Raises:
      BadDataError: there is none.
    """
    if place.is_file():
        return [place]
    folder = place / subfolder if (place / subfolder).is_dir() else place
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())
    for_training = [p for p in found if any(part.startswith("train") for part in p.relative_to(folder).parts)]
    if not found:
        what = f"holds no file that ends in {', '.join(ENDINGS)}" if place.is_dir() else "does not exist"
        raise BadDataError(f"{place} {what}.")
    return for_training or found


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a file, its kind told by its ending: parquet, or else JSON lines, gzipped where it ends in ".gz".

    Args:
      path: the file.
      columns: the only ones of a parquet file that are read, as far as it has them, `info.id` being one inside another;
        None for all.

    Raises:
      BadDataError: the file, its line or row, and what is wrong with it.
    """
    if path.name.endswith(".parquet"):
        return parquet_rows(path, columns)
    return ((f"{path}, line {line.number}", line.value) for line in iterate_jsonl(path, nan=True))


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a parquet file; see `read_rows`. Columns that are not read are None."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
            wanted = [leaf for leaf in leaves if columns is None or _is_part(leaf, columns)]
            unread = dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", unread | row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"{path} cannot be read as parquet, behind row {number} ({reason}).") from error
    except OSError as error:
        if error.errno is None or isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise BadDataError(f"{path} cannot be read as parquet ({error}).") from error
        raise  # a failing disk, which may be tried again


def _is_part(leaf: str, columns: Sequence[str]) -> bool:
    return any(leaf == column or leaf.startswith(f"{column}.") for column in columns)
