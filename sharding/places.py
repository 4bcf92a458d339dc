"""Paths and URLs as people write them, made one form where they enter."""

from __future__ import annotations

import os
import re
import urllib.parse

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://.")


def place(text: str) -> str:
    """A path or URL in the one form that everything behind takes. What is so already stays as it is.

    ``~`` and ``~user`` become the home folder, ``file:/x`` and ``file:///x`` become ``/x``; of a path, everything else is
    part of a name (``::`` too, which is a chain in fsspec's URLs). Other URLs, such as ``s3://``, stay as they are.

    Args:
        text: what somebody wrote; "" stays "".

    Raises:
        ValueError: there is no such home folder, a file URL names another machine, or the text cannot be a path or URL.
    """
    if "\0" in text or "\n" in text or "\r" in text:
        raise ValueError(f"{text!r}: a path or URL of one line is needed")
    if text.startswith("file:"):
        found = urllib.parse.urlsplit(text, allow_fragments=False)
        if found.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: names the machine {found.netloc!r}; a file URL has three slashes: file:///path")
        path = text.removeprefix("file:").removeprefix("//" + found.netloc) if text[5:7] == "//" else text[5:]
        if not path.startswith("/"):
            raise ValueError(f"{text}: a file URL needs a full path: file:///path")
        return path
    if "://" in text:
        if not _REMOTE.match(text):
            raise ValueError(f"{text!r}: not a path, file:// or s3:// URL")
        return text
    if text.startswith("~"):
        path = os.path.expanduser(text)
        if path.startswith("~"):
            raise ValueError(f"{text}: that user has no home folder; write ./{text} for a folder of that name")
        return path
    return text
