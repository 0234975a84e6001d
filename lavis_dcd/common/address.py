"""Addresses of files on the web: checked before they are used, and shown without the secrets in them."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit

from lavis_dcd.common.address_secrets import HIDDEN, shown_address
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.names import name_fault
from lavis_dcd.common.texts import one_line

_LONGEST = 4096
_LEGAL = "-._~:/?#[]@!$&'()*+,;=%"  # beside letters and digits (RFC 3986)
_ILLEGAL = re.compile(rf"[^A-Za-z0-9{re.escape(_LEGAL)}]|%(?![0-9A-Fa-f]{{2}})")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|https?:", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
_SUM_DIGITS = {"sha256": 64, "md5": 32}

# query parameters that say who may read and until when, and change while the file stays: by the one that signs
_SIGNED = {
    "x-amz-signature": re.compile(r"x-amz-.*"),
    "x-goog-signature": re.compile(r"x-goog-.*"),
    "signature": re.compile(r"signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"),
    "sig": re.compile(r"sig|s[etprv]|spr|sip|si|sk[oestv]|skoid|sktid"),
}
_OWN_ENDINGS = (".part", ".part.json", ".download.json", ".lock")


def looks_like_address(text: str) -> bool:
    """Return whether `text` begins as an address of any scheme does; no name of a local file is meant then."""
    return _SCHEME.match(text) is not None


@dataclass(frozen=True, repr=False)
class Address:
    """An http(s) address that was checked. Use `parse`; printed, it shows no secret.

    Args:
        url: what a server is sent: without name, password and fragment.
        shown: for messages, logs and records.
        key: SHA-256 of all that says which file it is: not the password, nor parameters of a signature.
        authorization: the header's value made of the name and password in the address.
        sums: by "sha256" and "md5", from the fragment: `...#sha256=<64 digits>`.
    """

    url: str
    shown: str
    key: str
    authorization: str | None = None
    sums: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address of one file.

        Raises:
            UserError: it is none, or its last part can be no file's name.
        """
        address = cls._of(text)
        fault = _last_part_fault(address.file_name)
        if fault:
            raise UserError(f"{address}: {fault}")
        return address

    @classmethod
    def _of(cls, text: str) -> Address:
        fault = _fault(text)
        if fault:
            raise UserError(f"{_shortened(text)}: {fault}")
        parts = urlsplit(text)
        user, at, _ = parts.netloc.rpartition("@")
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        host += f":{parts.port}" if parts.port else ""
        url = parts._replace(netloc=host, fragment="", path=parts.path or "/").geturl()
        shown = shown_address(parts._replace(netloc=f"{user}@{host}" if at else host, fragment="").geturl())
        authorization = "Basic " + base64.b64encode(unquote_to_bytes(user)).decode() if at else None
        return cls(url, one_line(shown), _key(parts, user.partition(":")[0]), authorization, _sums(parts.fragment))

    def redirected(self, location: str | None) -> Address:
        """Return where a server sends on to; the name and password go along to the same server only.

        Raises:
            UserError: no such address, or one that is less protected.
        """
        if not location:
            raise UserError(f"{self.shown}: the server redirects without saying where to")
        # as in a browser, what must not stand in an address is encoded
        there = quote(location.strip(), safe=_LEGAL, encoding="iso-8859-1", errors="replace")
        try:
            target = Address._of(urljoin(self.url, there))
        except (UserError, ValueError) as error:
            raise UserError(f"{self.shown}: the server redirects to another place: {error}") from error
        if self.url.startswith("https:") and not target.url.startswith("https:"):
            raise UserError(f"{self.shown}: the server redirects from https to {target.shown}, unprotected; refused")
        if target.authorization is None and self.authorization and _origin(self.url) == _origin(target.url):
            return Address(target.url, target.shown, target.key, self.authorization)
        return target

    @property
    def file_name(self) -> str:
        """The last part of the path, decoded."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])

    @property
    def repository(self) -> tuple[str, ...]:
        """Owner and name of the repository, of addresses in the hub's form; else empty."""
        parts = [unquote(part) for part in urlsplit(self.url).path.split("/")[1:]]
        named = len(parts) > 3 and parts[2] == "resolve" and all(re.fullmatch(r"[\w.-]+", part) for part in parts[:2])
        return tuple(parts[:2]) if named else ()

    def __repr__(self) -> str:
        return f"Address({self.shown})"

    def __str__(self) -> str:
        return self.shown


def _shortened(text: str) -> str:
    """Return what may be shown of an address that is none: one line, no secret."""
    scheme, separator, rest = text.partition("://")
    if "@" in rest:  # a password that is not encoded may hold any mark
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    return one_line(shown_address(scheme + separator + rest) if separator else text, 120)


def _fault(text: str) -> str | None:
    """Return why `text` is no address to fetch from; None where it is one."""
    if len(text) > _LONGEST:
        return f"is an address of {len(text)} characters, at most {_LONGEST} are read; correct it"
    illegal = _ILLEGAL.search(text)
    if illegal:
        return f"holds {illegal[0]!a}, which no address has; write it percent-encoded, as in %20 for a space"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # its words may have a part of a password
        return "names no server and port; it begins as in https://server/path or https://server:8080/path"
    if parts.scheme not in _PORTS:
        return "is fetched by nothing here, only https:// and http:// are; bring the file by hand and name its path"
    if not host:
        return "names no server; it begins as in https://server/path"
    if port == 0:
        return "has the port 0; leave it out or name another"
    return _host_fault(parts.netloc.rpartition("@")[2], host)


def _host_fault(netloc: str, host: str) -> str | None:
    if netloc.startswith("["):
        with suppress(ValueError):
            ipaddress.IPv6Address(host.partition("%")[0])
            if re.fullmatch(r"\[[^\]]*\](:[0-9]*)?", netloc):
                return None
        return "names no server; in the brackets stands an address of IPv6, as in https://[::1]/path"
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(re.fullmatch(r"[a-z0-9_-]{1,63}", label) for label in labels):
        return "names no server; a server's name has letters, digits, hyphens and dots"
    return None


def _last_part_fault(name: str) -> str | None:
    if not name:
        return "names no file; name the address of one"
    if name.endswith(_OWN_ENDINGS):
        return f"ends in {one_line(repr(name), 80)}, as files beside a download do; rename the file there"
    if name_fault(name, "") or ";" in name or "\ufffd" in name:
        return (
            f"ends in {one_line(repr(name), 80)}, which can be no file's name (a few letters, digits, . - and _); name "
            "the address of one file"
        )
    return None


def _key(parts: SplitResult, user: str) -> str:
    port = parts.port or _PORTS[parts.scheme]
    items = [(item, unquote(item.partition("=")[0]).lower()) for item in parts.query.split("&")]
    names = {name for _, name in items}
    dropped = [pattern for signing, pattern in _SIGNED.items() if signing in names]
    query = "&".join(item for item, name in items if not any(pattern.fullmatch(name) for pattern in dropped))
    text = f"{parts.scheme}://{user}@{(parts.hostname or '').lower()}:{port}{parts.path or '/'}?{query}"
    return hashlib.sha256(text.encode()).hexdigest()


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]


def _sums(fragment: str) -> dict[str, str]:
    """Return the checksums that an address ends in; other fragments say nothing about the file."""
    given = (item.partition("=") for item in fragment.split("&"))
    return {name.lower(): value for name, _, value in given if name.lower() in _SUM_DIGITS}


def sum_fault(name: str, value: str) -> str | None:
    """Return what is wrong with a checksum as a text: the kind `name` ("sha256", "md5") has so many digits."""
    digits = _SUM_DIGITS[name]
    if re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
        return None
    return f"{value[:80]!a} is no {name}, which is {digits} digits of 0-9 and a-f"
