"""griffe extension: docstrings as Markdown. ``Example:`` is the section that griffe calls ``Examples:``."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section's title, and end a sentence before a block in one colon, before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = text.replace("::\n\n", ":\n\n")


class OneTable(griffe.Extension):
    """Drop the parameters that unpack_typeddict adds without a word: the docstring has them, several to a line."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.name == "__init__" and func.docstring is not None and not func.docstring.value:
            func.docstring = None
