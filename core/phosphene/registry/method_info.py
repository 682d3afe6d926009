"""``MethodInfo``: what a method declares, from a cache, without importing the method's module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.machinery import PathFinder
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import PhospheneError, PluginError
from ..json_cache import read_cached, write_cached
from .plugins import BrokenPlugin, Outline, Plugin, load_plugin

if TYPE_CHECKING:
    from ..results import Result
    from ..spec.spec import MethodSpec
    from .method import Method

#: The call that ``MethodInfo.passes`` counts for: one image, a data set of a thousand, ResNet-50's layers.
NOMINAL_SIZES: dict[str, Any] = {
    "images": 1,
    "height": 224,
    "width": 224,
    "dataset": 1000,
    "styles": 1,
    "frames": 6,
    "checkpoints": 1,
    "channels": 2048,
    "stages": ("",) * 5,
}


@dataclass(frozen=True, repr=False)
class MethodInfo:
    """A method's metadata; its module is imported only when it is called or ``load`` is.

    ``document`` is the spec as JSON, which ``phosphene show NAME --json`` prints. ``roles`` has, for each
    input role, the placeholder and the help text of its option. ``relations`` are written as they are
    declared. ``seed`` is the parameter that seeds the method, ``layers`` are those that name layers.
    ``passes`` is how many images pass forward and backward through the model with default parameters (one
    image of 224 x 224 pixels, a data set of 1,000; None where no cost is declared). ``module`` and ``line``
    are where the method's function is defined.
    """

    plugin: Plugin
    document: dict[str, Any]
    roles: dict[str, list[str]]
    relations: list[str]
    seed: str | None
    layers: list[str]
    passes: list[int] | None
    module: str
    line: int

    def __repr__(self) -> str:
        return f"<method {self.name}: {self.summary}>"

    @property
    def name(self) -> str:
        """The method's id: family and short name."""
        return str(self.document["name"])

    @property
    def distribution(self) -> str:
        """The installed package that the method comes from, and its version."""
        return f"{self.plugin.distribution} {self.plugin.version}"

    @property
    def family(self) -> str:
        """The family."""
        return str(self.document["family"])

    @property
    def title(self) -> str:
        """The name as papers write it."""
        return str(self.document["title"])

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return str(self.document["summary"])

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method needs of a model or of its caller."""
        return tuple(self.document["needs"])

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags."""
        return tuple(self.document["tags"])

    @property
    def accepts(self) -> tuple[str, ...]:
        """The roles of the inputs."""
        return tuple(i["role"] for i in self.document["inputs"])

    @property
    def returns(self) -> str:
        """The result type."""
        return str(self.document["returns"])

    @property
    def references(self) -> list[dict[str, Any]]:
        """The sources, each with key, title, authors, year and url."""
        return list(self.document["references"])

    def load(self) -> Method[..., Any]:
        """The method itself. Raises PluginError if its module can no longer be imported."""
        return load_method(self.plugin)

    @property
    def spec(self) -> MethodSpec:
        """The loaded method's spec."""
        return self.load().spec

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Load the method and call it."""
        result: Result = self.load()(*args, **kwargs)
        return result


def load_method(plugin: Plugin) -> Method[..., Any]:
    """A plugin's method. Raises PluginError if it cannot be loaded."""
    loaded: Method[..., Any] | BrokenPlugin = load_plugin(plugin)
    if isinstance(loaded, BrokenPlugin):
        raise PluginError(broken_text(loaded))
    return loaded


def broken_text(broken: BrokenPlugin) -> str:
    """The message for a plugin that cannot be loaded."""
    return f"{broken.plugin.qualified} cannot be used: {broken.reason} (details: 'phosphene plugins --debug')"


@dataclass
class Metadata:
    """The metadata of one distribution's methods, computed once and stored in the cache folder.

    There are two documents: outlines, read from the sources, which suffice for names, titles and summaries;
    and what only an imported module can tell. Both are computed again when a file of the core or of the
    distribution's packages has changed.
    """

    plugins: tuple[Plugin, ...]
    _infos: dict[str, dict[str, Any]] | None = field(default=None, init=False)

    @cached_property
    def outlines(self) -> dict[str, Outline]:
        """Title, summary, arguments and line of each method by id; no module is imported."""
        cached = read_cached(f"{self._file}-outlines", self._fingerprint)
        if cached is None:
            outlines = {plugin.id: plugin.outline for plugin in self.plugins}
            write_cached(
                f"{self._file}-outlines", self._fingerprint, {n: asdict(o) for n, o in outlines.items()}
            )
            return outlines
        return {name: Outline(**outline) for name, outline in cached.items()}

    def infos(self, ids: Iterable[str]) -> dict[str, MethodInfo | BrokenPlugin]:
        """These methods' metadata; the module of a method that is not in the cache is imported."""
        if self._infos is None:
            self._infos = read_cached(f"{self._file}-infos", self._fingerprint) or {}
        plugins = {plugin.id: plugin for plugin in self.plugins}
        answer: dict[str, MethodInfo | BrokenPlugin] = {}
        computed: dict[str, dict[str, Any]] = {}
        for id in ids:
            if id not in self._infos:
                loaded = load_plugin(plugins[id])
                if isinstance(loaded, BrokenPlugin):  # not stored: what it lacks may be installed later
                    answer[id] = loaded
                    continue
                computed[id] = self._infos[id] = _describe(loaded)
            answer[id] = MethodInfo(plugins[id], **self._infos[id])
        if computed:
            stored = (
                read_cached(f"{self._file}-infos", self._fingerprint) or {}
            )  # another process's additions
            write_cached(f"{self._file}-infos", self._fingerprint, stored | computed)
        return answer

    @cached_property
    def _packages(self) -> dict[str, list[str]]:
        """Files and folders of the core and of the packages that hold the plugins, by name."""
        names = {"phosphene", *(p.entry_point.module.partition(".")[0] for p in self.plugins)}
        return {name: _package_paths(name) for name in sorted(names)}

    @cached_property
    def _file(self) -> str:
        """The cache's name: one for each distribution, version and location."""
        plugin = self.plugins[0]
        return f"{plugin.distribution}-{plugin.version}-{_digest(self._packages)[:16]}"

    @cached_property
    def _fingerprint(self) -> str:
        """A digest of what the metadata depends on: entry points, pydantic's version, the source files."""
        entries = [(p.id, p.entry_point.value) for p in self.plugins]
        files = {name: sorted(_source_files(paths)) for name, paths in self._packages.items()}
        return _digest((entries, version("pydantic"), files))


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _package_paths(name: str) -> list[str]:
    """The folders of a top-level package, or the file of a module; empty if it is not installed."""
    spec = PathFinder.find_spec(name)
    if spec is None:
        return []
    return list(spec.submodule_search_locations or filter(None, [spec.origin]))


def _source_files(paths: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and modification time of every Python file in these folders."""
    for path in paths:
        if not os.path.isdir(path):
            yield _stamp(path)
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            yield from (_stamp(os.path.join(folder, name)) for name in files if name.endswith(".py"))


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError:  # inside a zip file, or removed in the meantime
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def _describe(method: Method[..., Any]) -> dict[str, Any]:
    """The fields of a method's ``MethodInfo``, all but the plugin, as JSON has them."""
    from ..roles import ROLES  # late: roles import torch

    spec, function = method.spec, method.function
    return {
        "document": spec.model_dump(mode="json"),
        "roles": {i.role: [ROLES[i.role].metavar, ROLES[i.role].help] for i in spec.inputs},
        "relations": [str(relation) for relation in spec.relations],
        "seed": method.seed,
        "layers": method.layers,
        "passes": _nominal_passes(spec),
        "module": function.__module__,
        "line": function.__code__.co_firstlineno,
    }


def _nominal_passes(spec: MethodSpec) -> list[int] | None:
    """Passes of the nominal call with default parameters; None without a cost, or without such defaults."""
    if spec.cost is None:
        return None
    defaults = {n: f.get_default(call_default_factory=True) for n, f in spec.params.model_fields.items()}
    sizes = dict(NOMINAL_SIZES)
    if "channels" in defaults:  # the parameter that lists channels
        sizes["channels"] = None if defaults["channels"] is None else len(defaults["channels"])
    try:
        return list(spec.cost.evaluate(defaults, **sizes))
    except PhospheneError:  # the cost depends on a parameter without a default
        return None
