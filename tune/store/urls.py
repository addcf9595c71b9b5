"""The URLs that users give for storages, databases and servers, none of which may hold a secret.

Everybody on the machine can read a URL in the list of processes, and a sweep notes it. SQLAlchemy says what a URL holds.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl

from errors import UserError

AT_SIGN = "an @ that ends no login is written %40"
HARMLESS_NAMES = {  # in the query of a database's URL, in small letters
    *("application_name", "charset", "connect_timeout", "driver", "encrypt", "host", "options", "port", "service", "timeout"),
    *("sslcert", "sslkey", "sslmode", "sslrootcert", "ssl_ca", "ssl_cert", "ssl_check_hostname", "ssl_key", "unix_socket"),
    *("passfile", "target_session_attrs", "trusted_connection", "trustservercertificate", "user"),
}
SECRET_NAMES = {"client_secret", "sig"}  # in the query of a storage's URL


class URLContent(NamedTuple):
    """What a URL holds. ``query`` has the names of its query in small letters; ``shown`` is what a message may show of it."""

    has_user: bool
    has_password: bool
    query: set[str]
    shown: str


def read_url(url: str) -> URLContent:
    """Reads a URL of any scheme. Where it can be read in two ways, it is taken to hold a password."""
    from sqlalchemy import make_url  # takes a while to import
    from sqlalchemy.exc import ArgumentError

    scheme, _, rest = url.partition("://")
    login, _, place = rest.rpartition("@")
    try:
        parsed = make_url(url)
        has_user, has_password = parsed.username is not None, parsed.password is not None
    except (ArgumentError, ValueError):  # several hosts, or a port that is no number
        has_user, has_password = bool(login), False
    names = {name.lower() for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True)}
    shown = f"{scheme}://{'...' if '?' in login else place.partition('?')[0]}"
    return URLContent(has_user, has_password or ":" in login, names, shown)


def check_storage_url(url: str) -> str:
    """Returns the URL of an object store. ValueError where it holds credentials."""
    has_user, has_password, query, shown = read_url(url)
    has_container = url.startswith(("abfs://", "abfss://"))  # it stands where others have the user
    if has_password or (has_user and not has_container) or query & SECRET_NAMES:
        raise UserError(f"{shown!r} is not allowed with credentials in the URL; they come from the environment")
    return url
