"""Paths of image files: folders, glob patterns and ``file://`` URIs."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import InputError

#: Suffixes (in lower case) of the files that ``find_images`` returns.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


#: ``dog.mask.png`` is the object mask of the image ``dog.jpg``, not an image.
MASK_SUFFIX = ".mask.png"


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path, or a ``file://`` URI, as a path; ``~`` is the home folder.

    Raises:
        InputError: a URI of another scheme or host, or a path with a NUL character.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"{text!r:.80} is no path: it contains a NUL character")
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text):
        if match[1].lower() != "file":
            raise InputError(f"{text!r:.120} has the scheme {match[1]!r}: download it and pass the file")
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{text!r:.120} names the host {parts.netloc!r}: only local files are read")
        return Path(unquote(parts.path))
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files in a folder and its subfolders, sorted by path, without hidden files and masks.

    Raises:
        InputError: a missing folder, or one without images.
    """
    root = local_path(folder)
    if not root.is_dir():
        raise InputError(f"there is no folder at {str(folder)!r}")
    files = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    visible = [path for path in files if not any(p.startswith(".") for p in path.relative_to(root).parts)]
    images = [path for path in visible if not path.name.endswith(MASK_SUFFIX)]
    if not images:
        raise InputError(f"the folder {str(folder)!r} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(images)


def expand_path(path: str | os.PathLike[str]) -> list[Path]:
    """The image files that a path means: a file, all images of a folder, or those that match a glob pattern.

    In a pattern ``*`` and ``?`` match within a name and ``**`` any folders; the files are sorted by path.
    A file whose name contains these characters is that file.

    Raises:
        InputError: a folder without images, or a pattern that no image matches.
    """
    file = local_path(path)
    if file.is_dir():
        return find_images(file)
    if file.exists() or not glob.has_magic(str(file)):
        return [file]
    matches = sorted(map(Path, glob.glob(str(file), recursive=True)))
    images = [match for match in matches if match.is_file() and match.suffix.lower() in IMAGE_SUFFIXES]
    images = [image for image in images if not image.name.endswith(MASK_SUFFIX)]
    if not images:
        other = f"; it matches {len(matches)} other files and folders" if matches else ""
        raise InputError(f"no image matches the pattern {str(path)!r}{other}")
    return images
