"""Files and folders on this machine or at a URL of any fsspec filesystem, with one retry policy and one cache."""

from tccp.files.atomic import atomic_folder, atomic_path, sync, sync_tree, write_atomic
from tccp.files.cache import cache_folder, kept_folder, make_room, remote_copy
from tccp.files.folder import Folder, check_shared
from tccp.files.in_use import Reading, without_readers
from tccp.files.outputs import check_outputs, check_writable, check_writable_folder
from tccp.files.retry import (
    HTTP_TRANSIENT,
    AccessError,
    is_storage_failure,
    retried,
    storage_retries,
    translated_errors,
)
from tccp.files.urls import bare, is_http, is_url, local_path, open_filesystem, redacted

__all__ = [
    "HTTP_TRANSIENT",
    "AccessError",
    "Folder",
    "Reading",
    "atomic_folder",
    "atomic_path",
    "bare",
    "cache_folder",
    "check_outputs",
    "check_shared",
    "check_writable",
    "check_writable_folder",
    "is_http",
    "is_storage_failure",
    "is_url",
    "kept_folder",
    "local_path",
    "make_room",
    "open_filesystem",
    "redacted",
    "remote_copy",
    "retried",
    "storage_retries",
    "sync",
    "sync_tree",
    "translated_errors",
    "without_readers",
    "write_atomic",
]
