"""Files on disk: output folders and pages that are written atomically and replace only the project's own."""

from .output_folders import check_output_file, check_output_folder
from .work_folders import write_file

__all__ = ["check_output_file", "check_output_folder", "write_file"]
