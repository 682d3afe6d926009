"""``methods``: method plugins looked up by name and loaded one at a time."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Never

from ..errors import InputError, PluginError, UnknownName, value_repr
from .extensions import extensions
from .families import family_rank
from .hookspecs import METHODS_GROUP
from .method_info import Metadata, MethodInfo, broken_text, load_method
from .plugins import FIRST_PARTY, BrokenPlugin, Outline, Plugin, list_plugins, load_plugin

if TYPE_CHECKING:
    from .method import Method

#: One word or several.
Words = str | Iterable[str]

_KEYWORDS = (
    "text",
    "family",
    "tags",
    "needs",
    "accepts",
    "returns",
    "without",
    "reference",
    "year",
    "max_forward",
    "max_backward",
)


class Methods(Mapping[str, "Method[..., Any]"]):
    """All methods by id, short name, ``distribution:id`` or title; loading one imports that module only.

    A short name (``"pgd"``) means the first-party method if there is one, else the only third-party
    one. Two distributions with one id: the first-party one wins; of two third parties neither does
    by its bare id. So installing a plugin never changes what a name means. A title (``"Grad-CAM"``,
    ``"grad cam"``) is compared without case and punctuation, after the names; a first-party title
    takes precedence over a third party's short name.
    """

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin of this API version by ``distribution:id``, first-party ones first."""
        return {f"{p.distribution}:{p.id}": p for p in list_plugins(METHODS_GROUP)}

    def resolve(self, name: str) -> Plugin:
        """The plugin that a name means. Raises UnknownName, or PluginError where it is ambiguous."""
        matches = self._matches(name) if isinstance(name, str) else []
        if len(matches) == 1:
            return matches[0]
        if matches:
            choices = " or ".join(p.qualified if p in self._shared else p.id for p in matches)
            raise PluginError(f"{name!r} is the name of more than one method; write {choices}")
        # The names of the form that was asked for, so that each method is counted once.
        if "." in str(name):
            raise UnknownName("method", name, self._qualified_names() if ":" in name else self)
        raise UnknownName("method", name, map(self.shortest_name, map(self.resolve, self)))

    def _matches(self, name: str) -> list[Plugin]:
        """The plugins that a name may mean: of the first party if there are any, by name before by title."""
        named = self._names.get(name, [])
        if not (first := _first_party(named)):  # titles are read from the sources, and rarely needed
            titled = self._titles.get(normalize_title(name), [])
            first = _first_party(titled)
            named = named or titled
        return first or named

    @cached_property
    def _names(self) -> dict[str, list[Plugin]]:
        """The plugins that each short name, id and qualified name belongs to."""
        names: dict[str, list[Plugin]] = {}
        for qualified, plugin in self.plugins.items():
            for name in {qualified, plugin.id, plugin.id.rpartition(".")[2]}:
                names.setdefault(name, []).append(plugin)
        return names

    @cached_property
    def _titles(self) -> dict[str, list[Plugin]]:
        """The plugins that each normalized title belongs to."""
        titles: dict[str, list[Plugin]] = {}
        for plugin in self.plugins.values():
            titles.setdefault(normalize_title(self.outline(plugin).title), []).append(plugin)
        titles.pop("", None)
        return titles

    @cached_property
    def _metadata(self) -> dict[str, Metadata]:
        """The metadata of each distribution."""
        grouped: dict[str, list[Plugin]] = {}
        for plugin in self.plugins.values():
            grouped.setdefault(plugin.distribution, []).append(plugin)
        return {distribution: Metadata(tuple(plugins)) for distribution, plugins in grouped.items()}

    def outline(self, plugin: Plugin) -> Outline:
        """Title, summary and arguments of a plugin's method, without importing it."""
        return self._metadata[plugin.distribution].outlines[plugin.id]

    def info(self, name: str) -> MethodInfo:
        """A method's metadata; its module is imported only where the metadata is not in the cache.

        Raises UnknownName, or PluginError for an ambiguous name and for a plugin that cannot be loaded.
        """
        plugin = self.resolve(name)
        info = self._metadata[plugin.distribution].infos([plugin.id])[plugin.id]
        if isinstance(info, BrokenPlugin):
            raise PluginError(broken_text(info))
        return info

    def infos(self) -> list[MethodInfo]:
        """The metadata of every method that can be loaded, family by family."""
        plugins = [self.plugins[name] for name in self._qualified_names()]
        ids = {d: [p.id for p in plugins if p.distribution == d] for d in self._metadata}
        read = {d: self._metadata[d].infos(ids[d]) for d in ids}
        plugins.sort(key=lambda plugin: family_rank(plugin.family))
        infos = (read[plugin.distribution][plugin.id] for plugin in plugins)
        return [info for info in infos if isinstance(info, MethodInfo)]

    def shortest_name(self, plugin: Plugin) -> str:
        """The shortest name that means this plugin."""
        names = (plugin.short_name, plugin.id, plugin.qualified)
        return next(name for name in names if self._matches(name) == [plugin])

    def by_family(self) -> dict[str, dict[str, Plugin]]:
        """Every method's plugin by family and shortest name, families in their usual order."""
        families: dict[str, dict[str, Plugin]] = {}
        plugins = (self.plugins[name] for name in self._qualified_names())
        for plugin in sorted(plugins, key=lambda p: family_rank(p.family)):
            families.setdefault(plugin.family, {})[self.shortest_name(plugin)] = plugin
        return families

    def __repr__(self) -> str:
        """All names, a line per family; no method is loaded."""
        lines = [f"{len(self)} methods"]
        for family, plugins in self.by_family().items():
            names = textwrap.wrap(", ".join(plugins), 80)
            lines += [f"  {family if n == 0 else '':13}{line}" for n, line in enumerate(names)]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Method[..., Any]:
        return load_method(self.resolve(name))

    def __iter__(self) -> Iterator[str]:
        """Each method's id; where two third parties share one, ``distribution:id``."""
        for name in self._qualified_names():
            plugin = self.plugins[name]
            unique = plugin.distribution == FIRST_PARTY or plugin not in self._shared
            yield plugin.id if unique else name

    def _qualified_names(self) -> Iterator[str]:
        """Each method's qualified name, without those whose id the first party uses, too."""
        for name, plugin in self.plugins.items():
            others = self._shared.get(plugin, ())
            if plugin.distribution == FIRST_PARTY or all(p.distribution != FIRST_PARTY for p in others):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and len(self._matches(name)) == 1

    def load_all(self) -> dict[str, Method[..., Any]]:
        """Every method that can be loaded, by the names of ``iter``; ``broken()`` lists the others."""
        loaded = {name: load_plugin(self.resolve(name)) for name in self}
        return {name: method for name, method in loaded.items() if not isinstance(method, BrokenPlugin)}

    def broken(self) -> list[BrokenPlugin]:
        """Every plugin that cannot be loaded, extensions included, after trying them all."""
        loaded = map(load_plugin, (*self.plugins.values(), *extensions.plugins()))
        return [plugin for plugin in loaded if isinstance(plugin, BrokenPlugin)]

    def shadowed(self) -> dict[Plugin, list[Plugin]]:
        """Plugins whose id other distributions use, too, each with those other plugins."""
        return dict(self._shared)

    @cached_property
    def _shared(self) -> dict[Plugin, list[Plugin]]:
        by_id: dict[str, list[Plugin]] = {}
        for plugin in self.plugins.values():
            by_id.setdefault(plugin.id, []).append(plugin)
        shared = (plugins for plugins in by_id.values() if len(plugins) > 1)
        return {plugin: [p for p in plugins if p != plugin] for plugins in shared for plugin in plugins}

    def find(
        self,
        text: str = "",
        *,
        family: Words = (),
        tags: Words = (),
        needs: Words = (),
        accepts: Words = (),
        returns: Words = (),
        without: Words = (),
        reference: str = "",
        year: int | tuple[int, int] | None = None,
        max_forward: int | None = None,
        max_backward: int | None = None,
        **unknown: Never,
    ) -> list[MethodInfo]:
        """The methods that satisfy every condition, without importing them::

            methods.find("class activation map", without="gradients")
            methods.find(accepts=["labels"], returns="AdversarialExamples", max_backward=0)

        text: words of the title, name, summary, description or a reference, without case and punctuation;
            methods with these words in the title or name come first, then in the summary.
        family: family, or one of several.
        tags, needs, accepts: tags, needs and input roles that the method has, all of several.
        returns: result type, or one of several.
        without: tags, needs, input roles, families and result types that the method must not have.
        reference: words of one reference's authors, title, key or URL.
        year: year of a reference, or the first and the last year; with ``reference`` of the same one.
        max_forward, max_backward: the largest number of images that pass forward and backward through the
            model with default parameters (for one image, see ``MethodInfo``); ``max_backward=0`` selects
            black-box methods. Methods without a declared cost do not match.

        Returns:
            A list of ``MethodInfo``, family by family. ``info.load()`` imports the method.

        Raises:
            UnknownName: A word is no family, tag, need, input role or result type of any method, or an
                argument has an unknown name; with the nearest valid one.
            InputError: ``year``, ``max_forward`` or ``max_backward`` is malformed.
        """
        for name in unknown:
            raise UnknownName("keyword of find", name, _KEYWORDS)
        infos = self.infos()
        first_year, last_year = _year_range(year)
        limits = [_limit("max_forward", max_forward), _limit("max_backward", max_backward)]
        families = _valid_words("family", family, (i.family for i in infos))
        types = _valid_words("result type", returns, (i.returns for i in infos))
        all_tags = _valid_words("tag", tags, (tag for i in infos for tag in i.tags))
        all_needs = _valid_words("need", needs, (need for i in infos for need in i.needs))
        all_roles = _valid_words("input role", accepts, (role for i in infos for role in i.accepts))
        excluded = _valid_words("label", without, (label for i in infos for label in _labels(i)))
        matching: list[tuple[int, MethodInfo]] = []
        for info in infos:
            sources = (r for r in info.references if first_year <= r["year"] <= last_year)
            conditions = (
                not families or info.family in families,
                not types or info.returns in types,
                all_tags <= {*info.tags},
                all_needs <= {*info.needs},
                all_roles <= {*info.accepts},
                not excluded & _labels(info),
                (year is None and not reference)
                or any(_has_words(reference, *map(str, r.values())) for r in sources),
                limits == [None, None] or _within(info.passes, limits),
            )
            if all(conditions) and (rank := _text_rank(text, info)) is not None:
                matching.append((rank, info))
        return [info for _, info in sorted(matching, key=lambda item: item[0])]


def _first_party(plugins: list[Plugin]) -> list[Plugin]:
    return [plugin for plugin in plugins if plugin.distribution == FIRST_PARTY]


def normalize_title(title: str) -> str:
    """A title without case and punctuation; a plus sign is the word, or Grad-CAM++ would equal Grad-CAM."""
    return re.sub(r"[\W_]+", "", title.replace("+", "plus")).casefold()


def _has_words(query: str, *texts: str) -> bool:
    """Whether each word of a query starts a word of the texts, without case and punctuation."""
    words = [word for text in texts for word in (*_split(text), normalize_title(text))]
    return all(any(word.startswith(part) for word in words) for part in _split(query))


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.replace("+", " plus ").casefold())


def _labels(info: MethodInfo) -> set[str]:
    """What ``without`` may exclude."""
    return {info.family, info.returns, *info.tags, *info.needs, *info.accepts}


def _valid_words(kind: str, words: Words, valid: Iterable[str]) -> set[str]:
    """One word or several as a set. Raises UnknownName for one that no method has."""
    chosen, allowed = {words} if isinstance(words, str) else {*words}, {*valid}
    for word in chosen:
        if word not in allowed:
            raise UnknownName(kind, word, sorted(allowed))
    return chosen


def _year_range(year: int | tuple[int, int] | None) -> tuple[float, float]:
    match year:
        case None:
            return float("-inf"), float("inf")
        case int():
            return year, year
        case [int(), int()]:
            return year[0], year[1]
    raise InputError(f"year={year!r} should be a year, such as 2017, or the first and the last: (2014, 2017)")


def _limit(name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise InputError(f"{name}={value_repr(value)} should be a number of images, 0 or more")
    return value


def _within(passes: list[int] | None, limits: list[int | None]) -> bool:
    """Whether forward and backward passes are at most these; not where they are unknown."""
    pairs = zip(passes or (), limits, strict=False)
    return passes is not None and all(limit is None or count <= limit for count, limit in pairs)


def _text_rank(text: str, info: MethodInfo) -> int | None:
    """0 where title and name have all these words, 1 with the summary, 2 with all text; None elsewhere."""
    parts = [info.title, info.name, info.summary, info.document["description"]]
    parts += [f"{r['title']} {r['authors']}" for r in info.references]
    return next((rank for rank, end in enumerate((2, 3, None)) if _has_words(text, *parts[:end])), None)


methods = Methods()
