"""Names and passwords of HTTP Basic authentication, as the WebUI's own API asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from secrets import compare_digest
from typing import Any

from fastapi import Depends, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials


def credentials_of(text: str) -> dict[str, str]:
    """Passwords by name, from the `user:pass,user2:pass2` of --api-auth."""
    pairs = (each.partition(":") for each in text.split(","))
    return {name: password for name, _, password in pairs}


def basic_auth(passwords: Mapping[str, str]) -> Callable[..., None]:
    """A dependency of routes: returns for a known name with its password, else answers 401."""

    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        known = passwords.get(given.username)
        # The comparison's time says nothing of the password; bytes, for texts must be ASCII.
        if known is None or not compare_digest(given.password.encode(), known.encode()):
            raise HTTPException(
                401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
            )

    # Written out: FastAPI cannot look up annotations that are texts in a function within a function.
    check.__annotations__ = {"given": HTTPBasicCredentials}
    return check


def protected(passwords: Mapping[str, str] | None) -> list[Any]:
    """The dependencies of routes that only those with a password may use; none without passwords."""
    return [Depends(basic_auth(passwords))] if passwords else []
