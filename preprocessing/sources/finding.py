"""Finds films in folders, patterns and manifests, on this machine or at a URL; gives a table with a row per film."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from tccp.errors import TccpError
from tccp.files import bare, is_http, is_url, local_path, open_filesystem, redacted, retried
from tccp.strict_json import parse_json

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".f4v", ".mj2"),  # MP4 and QuickTime
    *(".mkv", ".mk3d", ".webm"),  # Matroska
    *(".avi", ".divx"),
    *(".mpg", ".mpeg", ".mpe", ".m2p", ".ps", ".vob", ".vro"),  # MPEG program streams
    *(".ts", ".mts", ".m2ts", ".m2t", ".tp", ".trp"),  # MPEG transport streams
    *(".flv", ".asf", ".wmv", ".ogv", ".ogm", ".ogx", ".mxf", ".nut", ".ivf"),
)
"""Endings of all containers that tccp.media reads. Files in a folder with these endings are sources; a file that is
given itself may have any name."""
MANIFEST_SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson")
MANIFEST_COLUMNS = ("path", "source", "speaker_x", "speaker_y", "person")
SOURCE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # on this machine, or a URL
        ("source", pa.string()),  # the name in reports; unique
        ("speaker_x", pa.float32()),  # a point on the speaker, source pixels
        ("speaker_y", pa.float32()),
        ("person_picture", pa.string()),  # path or URL of a picture of the requested person
    ]
)
_LEFT_OUT = b"left_out"  # in the metadata of the table
_MAX_SPEAKER_PX = 100_000.0
_Answer = TypeVar("_Answer")


@dataclass
class _Film:
    """path: on this machine, or a URL. named: whether the user chose `name`; else it is made from the path."""

    path: str
    name: str
    named: bool = False
    speaker: tuple[float, float] | None = None
    person: str | None = None


def find_sources(given: Sequence[str | Path], base: Path | None = None) -> pa.Table:
    """Rows of SOURCE_SCHEMA for films, folders of films, patterns and manifests. Only manifests are opened.

    given: paths, or URLs of any fsspec filesystem. A folder stands for the films in it, sorted by name. A pattern
    (`films/**/*.mp4`) stands for the matching films, or for all matching files if it states an ending. A `.csv`,
    `.parquet`, `.jsonl` or `.ndjson` file is a manifest: it lists films in its column `path`, and may have the columns
    `source`, `speaker_x`, `speaker_y` and `person`; its relative paths start from its own folder. base: the folder from
    which relative paths of `given` start; by default the current one.

    `source` is relative to the folder, or to the part of a pattern before its first wildcard. Names that would be equal
    are extended by the folders above until they differ. A film that is given twice is listed once, at its first place,
    with the details of both.
    Hidden files and folders are left out: unfinished films of an interrupted writer have such names.
    `files_left_out` tells which other files the folders contain.
    Raises TccpError if a folder or pattern contains no film, a manifest is invalid, an address refuses the access, or
    nothing is given; StorageError if an address cannot be reached.
    """
    films: dict[str, _Film] = {}
    others: set[str] = set()
    for item in given:
        for film in _films_of(local_path(str(item)), base, others):
            if is_url(film.path):
                open_filesystem(film.path)  # sends no request; raises if the package for such addresses is missing
            key = film.path if is_url(film.path) else os.path.abspath(film.path)
            films[key] = _merged(films[key], film) if key in films else film
    if not films:
        raise TccpError("no source was given: give at least one film or folder of films")
    columns = {
        "path": [film.path for film in films.values()],
        "source": _distinct_names(list(films.values())),
        "speaker_x": [film.speaker and film.speaker[0] for film in films.values()],
        "speaker_y": [film.speaker and film.speaker[1] for film in films.values()],
        "person_picture": [film.person for film in films.values()],
    }
    kinds = Counter(posixpath.splitext(bare(other))[1].lower() for other in others)
    metadata = {_LEFT_OUT: json.dumps(dict(sorted(kinds.items())))}
    try:
        return pa.table(columns, schema=SOURCE_SCHEMA).replace_schema_metadata(metadata)
    except UnicodeEncodeError as error:
        raise TccpError(f"{error.object!a}: the name is not UTF-8: rename the file") from None


def files_left_out(table: pa.Table) -> dict[str, int]:
    """How many files in the folders and patterns of `find_sources` are no films, by ending ("": without one)."""
    return json.loads((table.schema.metadata or {}).get(_LEFT_OUT, b"{}"))


def _films_of(item: str, base: Path | None, others: set[str]) -> list[_Film]:
    """The films that one argument stands for. Adds the other files of folders to `others`."""
    remote = is_url(item)
    if not remote:
        item = str((base or Path()) / os.path.expanduser(item))
    if item.endswith("/") if remote else os.path.isdir(item):
        return _in_folder(item, others)
    root, pattern = _split_pattern(item)
    if pattern and not os.path.lexists(item):
        return _matching(item, root, pattern, others)
    suffix = posixpath.splitext(bare(item))[1].lower()
    if suffix in MANIFEST_SUFFIXES:
        return _in_manifest(item)
    if remote and suffix not in VIDEO_SUFFIXES and _is_folder(item):
        return _in_folder(item, others)
    return [_Film(item, posixpath.basename(bare(item)))]


def _in_folder(folder: str, others: set[str]) -> list[_Film]:
    names = _split_off(_listed(folder, None), folder, others)
    if not names:
        raise TccpError(
            f"{redacted(folder)} contains no film ({', '.join(VIDEO_SUFFIXES)}): give a folder with films, or films"
        )
    return [_Film(_join(folder, name), bare(name, folder)) for name in names]


def _matching(item: str, root: str, pattern: str, others: set[str]) -> list[_Film]:
    from fsspec.utils import glob_translate

    try:
        # Fails if `**` is only part of a path component, or if [ and ] are not paired.
        matches = re.compile(glob_translate(pattern)).match
    except (ValueError, re.error) as error:
        raise TccpError(f"{redacted(item)} is not a valid pattern: {error}") from None
    depth = None if "**" in pattern.split("/") else pattern.count("/") + 1
    ending = posixpath.splitext(pattern)[1]
    wanted = ending and not _is_magic(ending, root)
    names = [name for name in _listed(root, depth) if matches(name)]
    names = names if wanted else _split_off(names, root, others)
    if not names:
        raise TccpError(f"{redacted(item)} matches no film; check the pattern: `**/*.mp4` also looks into subfolders")
    films = []
    for name in names:
        path = _join(root, name)
        is_manifest = posixpath.splitext(bare(path))[1].lower() in MANIFEST_SUFFIXES
        films += _in_manifest(path) if is_manifest else [_Film(path, bare(name, root))]
    return films


def _split_off(names: Sequence[str], root: str, others: set[str]) -> list[str]:
    """The names of films. Adds the paths of the other files to `others`."""
    films = [name for name in names if _is_film(name, root)]
    others.update(_join(root, name) for name in set(names).difference(films))
    return films


def _join(folder: str, name: str) -> str:
    return name if folder == "." else posixpath.join(folder, name)


def _is_film(name: str, root: str) -> bool:
    return bare(name, root).lower().endswith(VIDEO_SUFFIXES)


def _is_magic(part: str, whole: str) -> bool:
    """Whether it has a wildcard; in an HTTP address, a question mark begins the query instead."""
    return re.search(r"[*\[]" if is_http(whole) else r"[*?\[]", part) is not None


def _split_pattern(item: str) -> tuple[str, str]:
    """Splits a path or URL before its first component with a wildcard; the second part is empty if there is none."""
    start = item.find("://") + 3 if is_url(item) else 0
    parts = item[start:].split("/")
    for i, part in enumerate(parts):
        if _is_magic(part, item):
            root = item[:start] + "/".join(parts[:i])
            return root or ("/" if i else "."), "/".join(parts[i:])
    return item, ""


def _listed(root: str, depth: int | None) -> list[str]:
    """Files in a folder and its subfolders, relative to it, by name; `depth` 1: the folder alone. No hidden files."""
    names = _listed_remote(root, depth) if is_url(root) else _listed_here(root, depth)
    return sorted(names, key=lambda name: name.split("/"))


def _listed_here(root: str, depth: int | None) -> Iterator[str]:
    folders = [("", 1)]
    while folders:
        folder, level = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = posixpath.join(folder, entry.name)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):  # following a link to a folder above would never end
                        if depth is None or level < depth:
                            folders.append((name, level + 1))
                    elif entry.is_file():
                        yield name
        except OSError as error:
            if level > 1 or not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise TccpError(f"{error.filename} cannot be listed: {error.strerror}; give readable folders") from None


def _listed_remote(root: str, depth: int | None) -> Iterator[str]:
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    fs, place = open_filesystem(root.rstrip("/") if is_http(root) else root)
    # Object stores list all at once. Elsewhere it is folder by folder, and one that fails must not go unnoticed.
    find = getattr(type(fs), "_find", type(fs).find)

    def listed() -> list[str]:
        if depth == 1:
            return [entry["name"] for entry in fs.ls(place, detail=True) if entry["type"] == "file"]
        if find in (AbstractFileSystem.find, AsyncFileSystem._find):
            return list(fs.find(place, maxdepth=depth, on_error="raise"))
        return list(fs.find(place))

    found = _requested("list", root, listed)
    above = _without_protocol(place).rstrip("/") + "/"
    for path in map(_without_protocol, found):
        name = path.removeprefix(above)
        if name != path and not any(part.startswith(".") for part in name.split("/")):
            yield name


def _without_protocol(path: str) -> str:
    return path.partition("://")[2] or path


def _is_folder(url: str) -> bool:
    fs, place = open_filesystem(url)
    if is_http(url):
        return bool(_requested("look for", url, lambda: fs.isdir(place)))
    return bool(_requested("look for", url, lambda: fs.info(place))["type"] == "directory")


def _requested(verb: str, url: str, request: Callable[[], _Answer]) -> _Answer:
    """What a remote filesystem answers. Raises TccpError or StorageError, as `tccp.files.retried`."""
    try:
        return retried(f"{verb} {redacted(url)}", request)
    except FileNotFoundError:
        raise TccpError(f"{redacted(url)}: there is nothing; check the address") from None


def _in_manifest(manifest: str) -> list[_Film]:
    if is_url(manifest):
        fs, place = open_filesystem(manifest)
        data = _requested("read", manifest, lambda: bytes(fs.cat_file(place)))
    else:
        try:
            data = Path(manifest).read_bytes()
        except OSError as error:
            raise TccpError(f"manifest {manifest} cannot be read: {error.strerror}") from None
    title = f"manifest {redacted(manifest)}"
    suffix = posixpath.splitext(bare(manifest))[1].lower()
    rows = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(suffix, _json_rows)
    folder = posixpath.dirname(manifest.partition("?")[0] if is_http(manifest) else manifest)
    films = [_film_of(row, f"{title}, {where}", folder) for where, row in rows(title, data)]
    if not films:
        raise TccpError(f"{title} lists no film: give it a row for each film")
    return films


_Rows = Iterator[tuple[str, Mapping[str, object]]]


def _csv_rows(title: str, data: bytes) -> _Rows:
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(header, f"{title}, line 1")
        for cells in reader:
            where = f"line {reader.line_num}"
            if len(cells) > len(header):
                raise TccpError(f"{title}, {where}: has {len(cells)} values for {len(header)} columns; quote commas")
            if cells:
                yield where, dict(zip(header, cells, strict=False))
    except UnicodeDecodeError:
        raise TccpError(f"{title} is not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise TccpError(f"{title}, line {reader.line_num}: is not valid CSV: {error}") from None


def _json_rows(title: str, data: bytes) -> _Rows:
    for i, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig"))
        except ValueError as error:
            raise TccpError(f"{title}, line {i}: is not valid JSON: {str(error).splitlines()[0]}") from None
        if not isinstance(row, dict):
            raise TccpError(
                f'{title}, line {i}: is not a JSON object; give one on each line, such as {{"path": "film.mp4"}}'
            )
        _check_columns(list(row), f"{title}, line {i}")
        yield f"line {i}", row


def _parquet_rows(title: str, data: bytes) -> _Rows:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise TccpError(f"{title} is not a valid Parquet file: {str(error).splitlines()[0]}") from None
    _check_columns(table.column_names, title)
    for i, row in enumerate(table.to_pylist(), 1):
        yield f"row {i}", row


def _check_columns(names: Sequence[str], where: str) -> None:
    allowed = f"the columns are {', '.join(MANIFEST_COLUMNS)}, of which path is required"
    for name in names:
        if name not in MANIFEST_COLUMNS:
            raise TccpError(f"{where}: unknown column {name!r}; {allowed}")
    if "path" not in names:
        raise TccpError(f"{where}: the column path is missing; {allowed}")
    if len(set(names)) < len(names):
        raise TccpError(f"{where}: a column is given twice ({', '.join(names)})")


def _film_of(row: Mapping[str, object], where: str, folder: str) -> _Film:
    texts = {}
    for name in ("path", "source", "person"):
        text = row.get(name)
        if text is not None and not isinstance(text, str):
            raise TccpError(f"{where}: {name} is {text!r}; it must be text")
        if text is not None and re.search(r"[\x00-\x1f\x7f]", text):
            raise TccpError(f"{where}: {name} is {text!r}, with control characters; remove them")
        texts[name] = text if text and text.strip() else None
    path = texts["path"]
    if path is None:
        raise TccpError(f"{where}: path is missing; give the film of each row")
    x, y = (_pixels(row.get(name), name, where) for name in ("speaker_x", "speaker_y"))
    if (x is None) != (y is None):
        raise TccpError(f"{where}: speaker_x and speaker_y form a point: give both, or neither")
    own = texts["source"]
    below = not is_url(path) and not path.startswith("/") and ".." not in path.split("/")
    return _Film(
        path=_beside(path, folder),
        name=own or (posixpath.normpath(path) if below else posixpath.basename(bare(path))),
        named=own is not None,
        speaker=None if x is None or y is None else (x, y),
        person=texts["person"] and _beside(texts["person"], folder),
    )


def _pixels(value: object, name: str, where: str) -> float | None:
    try:
        number = None if value is None or value == "" else float(value)  # type: ignore[arg-type]
        if number is None or math.isnan(number):  # formats without null write NaN
            return None
        if not isinstance(value, bool) and 0 <= number < _MAX_SPEAKER_PX:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise TccpError(f"{where}: {name} is {value!r}; give a position in the picture in pixels, at least 0")


def _beside(path: str, folder: str) -> str:
    """A path in a manifest, resolved from the manifest's folder."""
    if is_url(path) or path.startswith("/"):
        return local_path(path)
    if not is_url(folder):
        return _join(folder, path)
    protocol, _, place = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path))}"


def _merged(one: _Film, other: _Film) -> _Film:
    """The details of a film that is given twice. Raises TccpError if they contradict each other."""
    for what, a, b in (
        ("speaker points", one.speaker, other.speaker),
        ("persons", one.person, other.person),
        ("names", one.named and one.name, other.named and other.name),
    ):
        if a and b and a != b:
            raise TccpError(f"{redacted(one.path)} is given twice with different {what}, {a} and {b}: give it once")
    name = other.name if other.named else one.name
    return _Film(one.path, name, one.named or other.named, one.speaker or other.speaker, one.person or other.person)


def _distinct_names(films: Sequence[_Film]) -> list[str]:
    """The films' names; equal ones are extended by the folders above until they differ."""
    parts = [bare(f.path if is_url(f.path) else os.path.abspath(f.path)).strip("/").split("/") for f in films]
    used = [0 if film.named else film.name.count("/") + 1 for film in films]
    names = [film.name for film in films]
    while True:
        alike = defaultdict(list)
        for i, name in enumerate(names):
            alike[name].append(i)
        again = [i for group in alike.values() if len(group) > 1 for i in group]
        if not again:
            return names
        for i in again:
            used[i] += 1
            tail = "/".join(parts[i][-used[i] :])
            names[i] = f"{films[i].name} ({tail})" if films[i].named else tail
            if used[i] > len(parts[i]):  # the paths are equal: protocols or queries (which may contain secrets) differ
                names[i] += f" #{hashlib.blake2b(films[i].path.encode(), digest_size=8).hexdigest()}"
