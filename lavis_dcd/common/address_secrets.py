"""Secrets in addresses: names and passwords, tokens and signatures, none of which a message, log or record shows."""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"
# a scheme is short; without the bound, a long word would be searched again from each of its letters
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,30}://[^\s'\"<>]+")
_SUM = re.compile(r"(sha256|md5)=[0-9A-Fa-f]+", re.IGNORECASE)

# query values that may be shown; any other may be a password, a token or a signature
_SHOWN = {
    "download", "raw", "dl", "alt", "v", "version", "rev", "revision", "ref", "format", "id", "export", "confirm",
    "file", "filename", "name", "path",
}  # fmt: skip


def without_secrets(text: str) -> str:
    """Return any text with the secrets in its addresses hidden."""
    return _IN_TEXT.sub(lambda match: shown_address(match[0]), text)


def shown_address(text: str) -> str:
    """Return an address, which need not be a sound one, without its secrets; a checksum at its end stays."""
    scheme, separator, rest = text.partition("://")
    rest, _, fragment = rest.partition("#")
    where, mark, query = rest.partition("?")
    host, slash, path = where.partition("/")
    if "@" in host:
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    path = re.sub(r";[^/]*", f";{HIDDEN}", path)
    sums = "&".join(item for item in fragment.split("&") if _SUM.fullmatch(item))
    return scheme + separator + host + slash + path + mark + _shown_query(query) + (f"#{sums}" if sums else "")


def _shown_query(query: str) -> str:
    shown = []
    for item in query.split("&"):
        name, equals, _ = item.partition("=")
        if unquote(name).lower() in _SHOWN or not item:
            shown.append(item)
        else:
            shown.append(name + equals + HIDDEN if equals else HIDDEN)
    return "&".join(shown)
