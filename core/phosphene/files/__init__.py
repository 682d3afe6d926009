"""Files on disk: output folders and pages that are written atomically and replace only the project's own."""

from .documents import list_files
from .output_folders import atomic_folder, check_output_file, check_output_folder
from .work_folders import sweep, work_folder, write_file

__all__ = [
    "atomic_folder",
    "check_output_file",
    "check_output_folder",
    "list_files",
    "sweep",
    "work_folder",
    "write_file",
]
