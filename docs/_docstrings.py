"""Docstrings as Markdown: what reads well in an editor and in `help()` does so in the site."""

import re

import griffe

# `name: what it is`, and what continues it four spaces further in: items of a list.
ITEM = re.compile(r"^(\w+(?:, \w+)*): (.+(?:\n {4}(?! *>>>).+)*)", re.MULTILINE)
# A session of the interpreter, with what it prints.
SESSION = re.compile(r"^( *)>>> .+(?:\n\1\S.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring that is read."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite this one's."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text):
    """The same as Markdown."""
    text = SESSION.sub(lambda match: _fenced(match[0], len(match[1])), text)
    return re.sub(r"\n(- \*\*)", r"\n\n\1", ITEM.sub(r"- **`\1`**: \2", text))


def _fenced(session, indent):
    lines = "\n".join(line[indent:] for line in session.split("\n"))
    return f"```pycon\n{lines}\n```"
