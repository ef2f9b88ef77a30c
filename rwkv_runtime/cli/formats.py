"""How --chat puts a turn to the model."""

from __future__ import annotations

from typing import NamedTuple


class ChatFormat(NamedTuple):
    """The message is followed by `request`, the assistant's answer begins with `opening`."""

    request: str = ""
    opening: str = ""

    def prompt(self, message: str) -> str:
        return f"User: {message}{self.request}\n\nAssistant:{self.opening}"

    def answer(self, text: str) -> str:
        """What the model wrote, without space around it, as it stands behind the prompt."""
        return text if self.opening else f" {text}"


FORMATS = {
    "world": ChatFormat(),
    "think": ChatFormat(opening=" <think"),
    "think-a-bit": ChatFormat(" think a bit", " <think"),
    "think-a-lot": ChatFormat(" think a lot", " <think"),
    "fake-think": ChatFormat(opening=" <think>\n</think"),
}
"""The World models' format, and those of the G1 models, with the open tag their model card has: the model closes it.

`fake-think` has nothing in its thoughts; `think-a-bit` and `think-a-lot` are for models since September 2025.
"""
