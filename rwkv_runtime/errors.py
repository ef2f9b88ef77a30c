"""Errors for people: one line that says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Collection


class RwkvError(Exception):
    """Base of every error this package raises on purpose; its text is meant to be read by a user."""


class CheckpointError(RwkvError):
    """A model file cannot be used: missing, damaged, unsafe, or of an unknown architecture."""


class VocabularyError(RwkvError):
    """A vocabulary file is malformed, or a token id is not in it."""


class StateError(RwkvError):
    """A recurrent state does not fit the model, or its file is damaged."""


class PluginError(RwkvError):
    """A plugin is broken, or breaks a rule of its hook."""


class BackendError(RwkvError):
    """A backend cannot run this model here; the text is the reason."""


class OptionError(RwkvError):
    """A name or a value given by the user is not valid; the text names the valid ones."""


class SamplingError(RwkvError):
    """No token can be drawn: a row of logits is not finite, or nothing in it may be chosen."""


def did_you_mean(name: str, known: Collection[str], otherwise: str, cutoff: float = 0.6, prefix: str = "") -> str:
    """A hint for a name that is not known: the nearest one that is, if one is near. All begin with the prefix."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def there_are(known: Collection[str]) -> str:
    """The end of a sentence that names all there are to choose from."""
    return f"there is only {', '.join(known)}" if len(known) == 1 else f"there are {', '.join(known) or 'none'}"
