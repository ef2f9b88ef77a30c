"""Discovery of plugins: what each offers, and why a broken one is broken."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any, Generic, TypeVar, get_args

import pluggy

from rwkv_runtime import hooks
from rwkv_runtime.backend import Backend
from rwkv_runtime.errors import OptionError, PluginError, did_you_mean, there_are
from rwkv_runtime.model import Architecture
from rwkv_runtime.sampler import Chain, Param, Sampler, Where

T = TypeVar("T")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
HOME = "rwkv-runtime"


class Registry(Generic[T]):
    """Named things of one kind; a name is given once."""

    def __init__(self, kind: str, base: type[T], problem: Callable[[T], str | None] = lambda item: None) -> None:
        """`problem` says what is wrong with one, beyond its type and its name."""
        self.kind = kind
        self.base = base
        self.problem = problem
        self._items: dict[str, T] = {}
        self._owners: dict[str, str] = {}

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def names(self) -> list[str]:
        return list(self._items)

    def owner(self, name: str) -> str:
        """The plugin that offers this name."""
        return self._owners[name]

    def check(self, item: object) -> T:
        """The item, fit to be added. Raises PluginError with the reason where it is not."""
        if not isinstance(item, self.base):
            hint = "the class itself, not an instance" if isinstance(item, type) else f"a {type(item).__name__}"
            raise PluginError(f"it offers {hint} where a {self.base.__name__} is expected")
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(f"a {self.kind}'s name is lower-case letters, digits, '.', '_', '-', not {name!r}")
        if problem := self.problem(item):
            raise PluginError(f"{self.kind} {name!r}: {problem}")
        if name in self._items:
            raise PluginError(f"{self.kind} {name!r} is already offered by {self._owners[name]}")
        return item

    def add(self, item: T, owner: str) -> None:
        name: str = self.check(item).name  # type: ignore[attr-defined]
        self._items[name] = item
        self._owners[name] = owner

    def get(self, name: str) -> T:
        """Raises OptionError that names the nearest one there is."""
        if name in self._items:
            return self._items[name]
        hint = did_you_mean(name, self._items, there_are(self._items), cutoff=0.5)
        raise OptionError(f"there is no {self.kind} {name!r}; {hint}")


@dataclass
class Plugin:
    """One plugin: where it came from, what it offers (kind -> names), or what is wrong with it."""

    name: str
    distribution: str
    version: str
    offers: dict[str, list[str]] = field(default_factory=dict)
    problem: str | None = None


class Plugins:
    """All plugins of one run. Build it with `load()`, or with `empty()` and `register()`."""

    def __init__(self) -> None:
        self.architectures: Registry[Architecture] = Registry("architecture", Architecture)  # type: ignore[type-abstract]
        self.backends: Registry[Backend] = Registry("backend", Backend, _backend_problem)  # type: ignore[type-abstract]
        self.samplers: Registry[Sampler] = Registry("sampler", Sampler, _sampler_problem)
        self.plugins: list[Plugin] = []
        self._staged: list[tuple[Registry[Any], Any]] = []
        self._answered: set[str] = set()
        self._manager = pluggy.PluginManager(hooks.PROJECT)
        self._manager.add_hookspecs(hooks)
        for hook, registry in self._hooks().items():
            stage = self._stage(hook, registry)
            getattr(self._manager.hook, hook).call_historic(result_callback=stage)

    def _hooks(self) -> dict[str, Registry[Any]]:
        return {
            "rwkv_architectures": self.architectures,
            "rwkv_backends": self.backends,
            "rwkv_samplers": self.samplers,
        }

    def _stage(self, hook: str, registry: Registry[Any]) -> Callable[[Iterable[Any]], None]:
        def stage(items: Iterable[Any]) -> None:
            self._answered.add(hook)
            if not isinstance(items, Iterable):
                raise PluginError(f"its hook {hook} returns a {type(items).__name__}, not a list of {registry.kind}s")
            for item in items:
                registry.check(item)
                if any(r is registry and i.name == item.name for r, i in self._staged):
                    raise PluginError(f"it offers {registry.kind} {item.name!r} twice")
                self._staged.append((registry, item))

        return stage

    @classmethod
    def empty(cls) -> Plugins:
        """No plugin at all; `register` adds them one by one."""
        return cls()

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Plugins:
        """Every installed plugin: built-ins first, then the others by name.

        The variable RWKV_PLUGINS (`a,b`) admits only the named third-party plugins; empty admits none.
        """
        plugins = cls()
        allowed = (os.environ if environ is None else environ).get("RWKV_PLUGINS")
        names = None if allowed is None else {name.strip() for name in allowed.split(",")} - {""}
        entries = entry_points(group=hooks.PROJECT)
        homes = {entry.dist: _distribution(entry.dist) for entry in entries}  # once each: it reads the whole metadata
        found = {(e.name, e.value, homes[e.dist][0]): e for e in entries}
        for entry in sorted(found.values(), key=lambda e: (homes[e.dist][0] != HOME, e.name)):
            if homes[entry.dist][0] == HOME or names is None or entry.name in names:
                plugins._load(entry, *homes[entry.dist])
        for name in sorted((names or set()) - {entry.name for entry in entries}):
            plugins.plugins.append(Plugin(name, "", "", problem="RWKV_PLUGINS names it, but it is not installed"))
        return plugins

    def _load(self, entry: EntryPoint, distribution: str, version: str) -> None:
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:  # whatever a stranger's module does costs only that plugin
            problem = f"cannot be imported: {_reason(error)}"
            self.plugins.append(Plugin(entry.name, distribution, version, problem=problem))
        else:
            self.register(plugin, entry.name, distribution, version)

    def register(self, plugin: object, name: str, distribution: str = "", version: str = "") -> Plugin:
        """Adds all that a plugin offers, or nothing of it; the record says which."""
        record = Plugin(name, distribution, version)
        self.plugins.append(record)
        self._staged.clear()
        self._answered.clear()
        label = f"{distribution}:{name}"
        if isinstance(plugin, type):
            record.problem = "it is a class; register a module or an instance"
            return record
        if self._manager.is_registered(plugin) or self._manager.has_plugin(label):
            record.problem = "it is registered already"
            return record
        try:
            self._manager.register(plugin, name=label)
            self._check_hooks(plugin)
        except (Exception, SystemExit) as error:  # whatever a stranger's hook does costs only that plugin
            record.problem = str(error) if isinstance(error, PluginError) else f"its hook raised {_reason(error)}"
            if isinstance(error, pluggy.PluginValidationError):  # its last line has the reason
                record.problem = f"a hook is not as this version has it: {str(error).strip().splitlines()[-1]}"
            self._staged.clear()
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            return record
        for registry, item in self._staged:
            registry.add(item, f"{name} ({distribution})" if distribution else name)
            record.offers.setdefault(registry.kind, []).append(item.name)
        self._staged.clear()
        return record

    def _check_hooks(self, plugin: object) -> None:
        callers = self._manager.get_hookcallers(plugin) or []
        known = self._hooks()
        for caller in callers:
            if caller.name not in known:
                hint = did_you_mean(caller.name, known, there_are(known))
                raise PluginError(f"it implements an unknown hook {caller.name!r}; {hint}")
            if caller.name not in self._answered:
                raise PluginError(f"its hook {caller.name} returns nothing; is a return missing?")
        if not callers:
            raise PluginError("it implements no hook; is @hookimpl missing?")

    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.problem]

    def warning(self) -> str | None:
        """One line about all broken plugins, or None."""
        broken = [f"{p.name}: {p.problem}" for p in self.broken()]
        if not broken:
            return None
        return f"{len(broken)} plugin{'s' * (len(broken) > 1)} left out: {'; '.join(broken)}"

    def sampler(self, names: str) -> Sampler:
        """One sampler, or a chain of them from `a,b,c`. Raises OptionError for a name that is not there."""
        each = [name.strip() for name in names.split(",")]
        if not all(each):
            raise OptionError(f"a sampler's name is missing in {names!r}")
        stages = [self.samplers.get(name) for name in each]
        return stages[0] if len(stages) == 1 else Chain(stages)


def _distribution(home: Distribution | None) -> tuple[str, str]:
    """Normalised name and version of the distribution an entry point comes from."""
    if home is None:
        return "", ""
    return re.sub(r"[-_.]+", "-", home.name).lower(), home.version


def _backend_problem(backend: Backend) -> str | None:
    return None if type(backend.priority) is int else f"its priority is a whole number, not {backend.priority!r}"


def _sampler_problem(sampler: Sampler) -> str | None:
    if not isinstance(sampler.params, Mapping):
        return "its params are a dictionary of Param by name"
    for name, param in sampler.params.items():
        if not isinstance(param, Param) or not isinstance(param.default, (int, float, str)):
            return f"its parameter {name!r} is not a Param with a number or a text as default"
    if sampler.runs not in get_args(Where):
        return f"`runs` is one of {', '.join(get_args(Where))}, not {sampler.runs!r}"
    return None


def _reason(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
