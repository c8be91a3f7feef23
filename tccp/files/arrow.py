"""An Arrow filesystem for a Folder at a URL: Ray Train writes checkpoints through it, with this package's retries."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from tccp.files.folder import Folder, RetriedReader
from tccp.files.retry import retried

_Result = TypeVar("_Result")


def arrow_filesystem(folder: Folder) -> tuple[FileSystem | None, str]:
    """The Arrow filesystem of a folder (None for this machine's), which repeats what fails, and the path in it."""
    if folder.local is not None:
        return None, str(folder.local.absolute())
    return PyFileSystem(RetriedHandler(folder)), folder.root


class RetriedHandler(FSSpecHandler):
    """Every request is repeated as `retried` says. What is written is sent at `close`, as a whole.

    Arrow's own handler takes a failed `isdir` or `exists` for an absence, so a checkpoint would seem to be missing.
    """

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder._fs)
        self._folder = folder

    def __reduce__(self) -> tuple:
        return RetriedHandler, (self._folder,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetriedHandler) and self._folder.place == other._folder.place

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _tried(self, verb: str, path: str, action: Callable[[], _Result]) -> _Result:
        return retried(f"{verb} {self.fs.unstrip_protocol(path)}", action)

    def _type(self, path: str) -> FileInfo:
        try:
            info = self._tried("look for", path, lambda: self.fs.info(path))
        except FileNotFoundError:
            return FileInfo(path, FileType.NotFound)
        return self._create_file_info(path, info)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._type(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        kind = self._type(selector.base_dir).type
        if kind == FileType.File:
            raise NotADirectoryError(selector.base_dir)
        if kind == FileType.NotFound:
            if selector.allow_not_found:
                return []
            raise FileNotFoundError(selector.base_dir)
        depth = None if selector.recursive else 1

        def found() -> dict[str, Any]:
            self.fs.invalidate_cache()
            return dict(self.fs.find(selector.base_dir, maxdepth=depth, withdirs=True, detail=True))

        rows = self._tried("list", selector.base_dir, found)
        base = selector.base_dir.strip("/")
        return [self._create_file_info(path, info) for path, info in rows.items() if path.strip("/") != base]

    def create_dir(self, path: str, recursive: bool) -> None:
        if not self._folder.in_object_store:
            self._tried("write", path, lambda: super(RetriedHandler, self).create_dir(path, recursive))

    def delete_dir(self, path: str) -> None:
        self._removed(path)

    def delete_file(self, path: str) -> None:
        self._removed(path)

    def _removed(self, path: str) -> None:
        with suppress(FileNotFoundError):  # an attempt whose answer was lost has removed it
            self._tried("remove", path, lambda: self.fs.rm(path, recursive=True))

    def open_input_stream(self, path: str) -> PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> PythonFile:
        file = self._tried("read", path, lambda: self.fs.open(path, mode="rb"))
        reader = RetriedReader(file, f"read {self.fs.unstrip_protocol(path)}")
        return PythonFile(io.BufferedReader(reader, buffer_size=1 << 20), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_Upload(self, path), mode="w")


class _Upload(io.RawIOBase):
    """Keeps what is written on this machine, and uploads it at `close`."""

    def __init__(self, handler: RetriedHandler, path: str) -> None:
        self._handler, self._path = handler, path
        self._file = tempfile.NamedTemporaryFile(prefix="tccp-")  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._file as file:
            file.flush()
            fs = self._handler.fs
            self._handler._tried("write", self._path, lambda: fs.put_file(file.name, self._path))

    def __del__(self) -> None:
        self._file.close()  # not our `close`: a file whose writer failed must not appear
