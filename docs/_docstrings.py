"""Docstrings as Markdown: what reads well in an editor and in `help()` does so in the site."""

import re

import griffe

# What the first lines of a module say to who changes it.
HOUSE = re.compile(r"^Lives here: .+(?:\n.+)*\n*", re.MULTILINE)
# A session of the interpreter, with what it prints.
SESSION = re.compile(r"^( *)>>> .+(?:\n\1\S.*)*", re.MULTILINE)
# Lines of `name: what it is`, each continued four spaces further in.
ITEM = re.compile(r"(\w+(?:, \w+)*): (.+(?:\n {4}.+)*)", re.MULTILINE)
ITEMS = re.compile(rf"(?:^|(?<=\n\n)){ITEM.pattern}(?:\n{ITEM.pattern})*(?=\n\n|\Z)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring that is read."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite this one's."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text):
    """The same as Markdown."""
    text = HOUSE.sub("", text)
    text = ITEMS.sub(lambda items: ITEM.sub(r"- **`\1`**: \2", items[0]), text)
    return SESSION.sub(lambda match: _fenced(match[0], len(match[1])), text)


def _fenced(session, indent):
    lines = "\n".join(line[indent:] for line in session.split("\n"))
    return f"```pycon\n{lines}\n```"
