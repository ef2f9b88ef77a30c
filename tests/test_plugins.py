"""Plugins one by one: what is offered, what is refused and why, and that nothing is half offered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rwkv_runtime import Architecture, Backend, Chain, OptionError, Param, PluginError, Plugins, Sampler, hookimpl
from rwkv_runtime.plugins import Registry


class Mine(Sampler):
    def __init__(self, name="mine"):
        self.name = name


class Other(Backend):
    name = "other"

    def forward(self, model):
        raise NotImplementedError


class Family(Architecture):
    name = "family"
    why_not = config = weights = state_spec = forward = sizes = random = reference = None


def plugin(**hooks):
    """An object with these hooks; a hook is a function, or what it is to return."""
    functions = {name: hook if callable(hook) else (lambda hook=hook: hook) for name, hook in hooks.items()}
    marked = {name: hookimpl(_no_arguments(function)) for name, function in functions.items()}
    return SimpleNamespace(**marked)


def _no_arguments(function):
    def hook():
        return function()

    return hook


def refused(*items, **hooks):
    """Why a plugin that offers these samplers, or has these hooks, is refused; it must leave nothing behind."""
    plugins = Plugins.empty()
    record = plugins.register(plugin(**(hooks or {"rwkv_samplers": list(items)})), "theirs", "dist", "1.0")
    assert record.offers == {}
    assert plugins.broken() == [record]
    assert not [*plugins.samplers.names(), *plugins.backends.names(), *plugins.architectures.names()]
    return record.problem


def test_the_hook_rwkv_samplers_offers_samplers():
    plugins, mine = Plugins.empty(), Mine()
    record = plugins.register(plugin(rwkv_samplers=[mine]), "theirs", "dist", "1.0")
    assert plugins.samplers.get("mine") is mine
    assert (record.offers, record.problem) == ({"sampler": ["mine"]}, None)
    assert plugins.samplers.owner("mine") == "theirs (dist)"


def test_the_hook_rwkv_backends_offers_backends():
    plugins = Plugins.empty()
    plugins.register(plugin(rwkv_backends=(Other() for _ in range(1))), "theirs")
    assert [backend.name for backend in plugins.backends] == ["other"]
    assert plugins.backends.owner("other") == "theirs"


def test_the_hook_rwkv_architectures_offers_architectures():
    plugins = Plugins.empty()
    plugins.register(plugin(rwkv_architectures=[Family()]), "theirs")
    assert plugins.architectures.names() == ["family"]


def test_one_plugin_may_offer_things_of_several_kinds():
    plugins = Plugins.empty()
    record = plugins.register(plugin(rwkv_samplers=[Mine("a"), Mine("b")], rwkv_backends=[Other()]), "theirs")
    assert record.offers == {"backend": ["other"], "sampler": ["a", "b"]}


def test_a_plugin_may_offer_nothing_today():
    plugins = Plugins.empty()
    assert plugins.register(plugin(rwkv_backends=[]), "theirs").problem is None


def altered(item, **attributes):
    """The same with other attributes, which a careless author may have given it."""
    vars(item).update(attributes)
    return item


def raising():
    raise RuntimeError("no licence found\nsecond line")


def yields_one_then_raises():
    yield Mine()
    raise TypeError("in the middle")


def leaves():
    raise SystemExit("bye")


PROBLEMS = {
    "it offers the class itself, not an instance where a Sampler is expected": {"rwkv_samplers": [Mine]},
    "it offers a Other where a Sampler is expected": {"rwkv_samplers": [Other()]},
    "it offers sampler 'mine' twice": {"rwkv_samplers": [Mine(), Mine()]},
    "its hook rwkv_samplers returns a Mine, not a list of samplers": {"rwkv_samplers": lambda: Mine()},
    "its hook rwkv_backends returns nothing; is a return missing?": {"rwkv_backends": lambda: None},
    "its hook raised RuntimeError: no licence found": {"rwkv_samplers": raising},
    "its hook raised TypeError: in the middle": {"rwkv_samplers": yields_one_then_raises},
    "its hook raised SystemExit: bye": {"rwkv_samplers": leaves},
    "sampler 'mine': its params are a dictionary of Param by name": {"rwkv_samplers": [altered(Mine(), params=3)]},
    "sampler 'mine': its parameter 'share' is not a Param with a number or a text as default": {
        "rwkv_samplers": [altered(Mine(), params={"share": 0.1})]
    },
    "sampler 'mine': `runs` is one of graph, device, host, not 'gpu'": {"rwkv_samplers": [altered(Mine(), runs="gpu")]},
    "backend 'other': its priority is a whole number, not 'high'": {
        "rwkv_backends": [altered(Other(), priority="high")]
    },
    "it implements an unknown hook 'rwkv_sampler'; did you mean rwkv_samplers?": {"rwkv_sampler": [Mine()]},
    "it implements an unknown hook 'on_start'; there are rwkv_architectures, rwkv_backends, rwkv_samplers": {
        "on_start": [Mine()]
    },
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_broken_plugin_is_refused_with_its_reason(problem):
    assert refused(**PROBLEMS[problem]) == problem


def test_a_hook_of_another_version_is_refused_with_what_does_not_fit():
    class Newer:
        @hookimpl
        def rwkv_samplers(self, runtime):
            return [Mine()]

    problem = Plugins.empty().register(Newer(), "theirs").problem
    assert problem.startswith("a hook is not as this version has it: Argument(s) {'runtime'}")
    assert Plugins.empty().register(Newer, "theirs").problem == "it is a class; register a module or an instance"


@pytest.mark.parametrize("name", ["", "Mine", "a,b", "a b", "-a", None, 3, "é", "a\n"])
def test_a_name_that_could_not_be_typed_or_would_break_a_chain_is_refused(name):
    assert refused(Mine(name)) == f"a sampler's name is lower-case letters, digits, '.', '_', '-', not {name!r}"


@pytest.mark.parametrize("name", ["a", "top-a", "min_p", "v2.1", "9"])
def test_plain_names_are_taken(name):
    plugins = Plugins.empty()
    plugins.register(plugin(rwkv_samplers=[Mine(name)]), "theirs")
    assert plugins.samplers.names() == [name]


def test_a_module_without_marked_hooks_is_refused():
    plugins = Plugins.empty()
    record = plugins.register(SimpleNamespace(rwkv_samplers=lambda: [Mine()]), "theirs")
    assert record.problem == "it implements no hook; is @hookimpl missing?"


def test_nothing_may_shadow_a_name():
    plugins, mine = Plugins.empty(), Mine()
    plugins.register(plugin(rwkv_samplers=[mine]), "ours")
    record = plugins.register(plugin(rwkv_samplers=[Mine("new"), Mine()]), "theirs")
    assert record.problem == "sampler 'mine' is already offered by ours"
    assert plugins.samplers.names() == ["mine"]
    assert plugins.samplers.get("mine") is mine


def test_a_plugin_that_fails_in_its_second_hook_leaves_nothing_of_its_first():
    for first, second in (("rwkv_samplers", "rwkv_backends"), ("rwkv_backends", "rwkv_samplers")):
        good = {"rwkv_samplers": [Mine()], "rwkv_backends": [Other()]}
        assert refused(**{first: good[first], second: raising}) == "its hook raised RuntimeError: no licence found"


def test_a_name_of_a_broken_plugin_is_free_for_another():
    plugins = Plugins.empty()
    plugins.register(plugin(rwkv_samplers=[Mine()], rwkv_backends=raising), "broken")
    assert plugins.register(plugin(rwkv_samplers=[Mine()]), "good").problem is None
    assert plugins.samplers.owner("mine") == "good"


def test_a_plugin_is_registered_once_and_the_second_time_does_no_harm():
    plugins, theirs = Plugins.empty(), plugin(rwkv_samplers=[Mine()])
    plugins.register(theirs, "a")
    assert plugins.register(theirs, "b").problem == "it is registered already"
    assert plugins.register(plugin(rwkv_backends=[Other()]), "a").problem == "it is registered already"
    assert plugins.samplers.names() == ["mine"]


def test_the_warning_is_one_line_about_all_that_is_broken():
    plugins = Plugins.empty()
    assert plugins.warning() is None
    plugins.register(plugin(rwkv_samplers=raising), "a")
    assert plugins.warning() == "1 plugin left out: a: its hook raised RuntimeError: no licence found"
    plugins.register(plugin(rwkv_sampler=[]), "b")
    assert plugins.warning().startswith("2 plugins left out: a: ")


def test_an_unknown_name_is_refused_with_the_nearest_one_or_with_all():
    plugins = Plugins.empty()
    with pytest.raises(OptionError, match="no sampler 'mine'; there are none"):
        plugins.samplers.get("mine")
    plugins.register(plugin(rwkv_samplers=[Mine("nucleus"), Mine("greedy")]), "ours")
    with pytest.raises(OptionError, match=r"no sampler 'nuclues'; did you mean nucleus\?"):
        plugins.sampler("nuclues")
    with pytest.raises(OptionError, match="no sampler 'xyz'; there are nucleus, greedy"):
        plugins.sampler("greedy,xyz")


def test_names_joined_by_commas_make_a_chain_in_that_order():
    plugins = Plugins.empty()
    plugins.register(plugin(rwkv_samplers=[Mine("a"), Mine("b")]), "ours")
    chain = plugins.sampler("b, a")
    assert isinstance(chain, Chain)
    assert chain.name == "b,a"
    assert plugins.sampler("a") is plugins.samplers.get("a")


def test_two_stages_with_a_parameter_of_one_name_make_no_chain():
    plugins = Plugins.empty()
    a, b = Mine("a"), Mine("b")
    a.params, b.params = {"p": Param(1.0)}, {"p": Param(2.0)}
    plugins.register(plugin(rwkv_samplers=[a, b]), "ours")
    with pytest.raises(OptionError, match="the chain a,b has 'p' twice"):
        plugins.sampler("a,b")


def test_a_registry_refuses_by_itself_what_has_not_been_checked():
    registry = Registry("sampler", Sampler)
    registry.add(Mine(), "ours")
    with pytest.raises(PluginError, match="already offered by ours"):
        registry.add(Mine(), "theirs")
    assert [sampler.name for sampler in registry] == ["mine"]


def test_built_in_plugins_are_all_sound_and_come_whatever_the_variable_says():
    for names in ("", "none-of-them"):
        plugins = Plugins.load({"RWKV_PLUGINS": names})
        assert {"rwkv6", "eager", "script", "compile", "nucleus", "greedy"} <= {p.name for p in plugins.plugins}
        assert [p.name for p in plugins.broken()] == ([names] if names else [])


def test_a_name_in_the_variable_that_is_not_installed_is_reported():
    (record,) = Plugins.load({"RWKV_PLUGINS": "no-such-plugin,"}).broken()
    assert (record.name, record.problem) == ("no-such-plugin", "RWKV_PLUGINS names it, but it is not installed")
