"""The records of a file of `torch.save`: opened once, checked before anything of it is unpickled."""

from __future__ import annotations

import os
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import UntypedStorage

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.unpickling import UnreadableError

_KINDS = {stat.S_IFIFO: "named pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFDIR: "folder"}
_BLOCK = 1 << 20
_LARGEST_PICKLE = 64 << 20  # bytes; the names and shapes of 100,000 tensors need half of it


@contextmanager
def opened_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading; a pipe or device, which could keep the reader for ever, is refused.

    What was checked is what is read, whatever gets the file's name meanwhile.

    Raises:
        UserError: there is no such file, it cannot be read, or it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"checkpoint {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({error}); permit it or name another file") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        name = _KINDS.get(kind, "special file")
        raise UserError(f"checkpoint {path} is no regular file but a {name}; name a file of weights")
    with os.fdopen(descriptor, "rb") as file:
        yield file


class Archive:
    """An opened file of `torch.save`: the pickle and the numbers of its tensors.

    torch's own reader never sees the file: it also takes TorchScript, which runs when it is read, and tar files.

    Args:
        file: opened for reading.
        path: of the file, for messages.

    Raises:
        UserError: no zip archive with `data.pkl`, or a TorchScript archive.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.size = os.fstat(file.fileno()).st_size
        try:
            self._archive = zipfile.ZipFile(file)
            names = self._archive.namelist()
        except Exception as error:  # zipfile has no common class for what it stumbles over in a damaged file
            raise UserError(
                f"checkpoint {path} is not a readable PyTorch file: it is no whole zip archive, as torch.save has "
                "written since torch 1.6; load an older file with a current torch and save it again, or name a "
                ".safetensors file"
            ) from error
        self._refuse_code(names, path)
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if not pickles:
            raise UserError(f"checkpoint {path} is not a readable PyTorch file: it is a zip archive without data.pkl")
        self._name = pickles[0]
        self._root = self._name.removesuffix("data.pkl")
        fault = self._fault(names, pickles)
        if fault:
            raise UserError(f"checkpoint {path} is not a readable PyTorch file: {fault}; name a file of torch.save")

    @staticmethod
    def _refuse_code(names: list[str], path: Path) -> None:
        """Refuse TorchScript; names are compared without regard to case, as torch's own reader finds them."""
        parts = [name.lower().replace("\\", "/").split("/") for name in names]
        if any("code" in part[:-1] or part[-1] == "constants.pkl" for part in parts):
            raise UserError(
                f"checkpoint {path} holds code: it is a TorchScript archive, which runs when it is read; nothing of it "
                "was run. Name a file from another place, or one of tensors only"
            )

    def _fault(self, names: list[str], pickles: list[str]) -> str | None:
        """Return what is wrong with the list of records, before any is read; None where nothing is."""
        records = self._archive.infolist()
        if len(pickles) > 1 or len({name.lower() for name in names}) < len(names):
            return "two of its records have one name"
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            # a compressed record may be any number of times larger than the file
            return "its records are compressed, which torch.save never does"
        if sum(record.file_size for record in records) > self.size:
            return "its records say that they are larger than the file"
        if self._archive.getinfo(self._name).file_size > _LARGEST_PICKLE:
            return f"its data.pkl has more than {_LARGEST_PICKLE >> 20} MB, without the numbers of tensors"
        return None

    def pickle(self) -> bytes:
        """Return the pickle.

        Raises:
            UnreadableError: the numbers are in another byte order than this machine's.
        """
        order = f"{self._root}byteorder"
        if order in self._archive.namelist() and self._archive.read(order) != sys.byteorder.encode():
            raise UnreadableError("its numbers are in the byte order of another kind of machine")
        return self._archive.read(self._name)

    def numbers(self, key: str, dtype: torch.dtype, count: int) -> UntypedStorage:
        """Return the bytes of a tensor's numbers.

        Raises:
            UnreadableError: there is no such record, or it has another size.
        """
        try:
            record = self._archive.getinfo(f"{self._root}data/{key}")
        except KeyError as error:
            raise UnreadableError(f"the record data/{key} is missing") from error
        if record.file_size != count * dtype.itemsize:
            raise UnreadableError(f"the record data/{key} is not {count} numbers of {dtype}")
        data = bytearray(record.file_size)
        with self._archive.open(record) as source:
            filled = 0
            while block := source.read(_BLOCK):
                data[filled : filled + len(block)] = block
                filled += len(block)
        if filled != record.file_size:
            raise UnreadableError(f"the record data/{key} is cut short")
        numbers = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return numbers.untyped_storage()
