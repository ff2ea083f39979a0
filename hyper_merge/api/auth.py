"""Checks names and passwords by HTTP Basic authentication, as the WebUI's own API does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from secrets import compare_digest
from typing import Any

from fastapi import Depends, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials


def parse_credentials(text: str) -> dict[str, str]:
    """Returns the passwords by name, from the `user:pass,user2:pass2` of --api-auth."""
    parts = (pair.partition(":") for pair in text.split(","))
    return {name: password for name, _, password in parts}


def basic_auth(passwords: Mapping[str, str]) -> Callable[..., None]:
    """Returns a dependency of routes that refuses requests without a known name and its password."""

    def check(credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        known = passwords.get(credentials.username)
        # The time of the comparison does not depend on the password; texts would have to be ASCII.
        if known is None or not compare_digest(credentials.password.encode(), known.encode()):
            raise HTTPException(
                401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
            )

    # Set by hand: FastAPI cannot resolve annotations that are strings in a nested function.
    check.__annotations__ = {"credentials": HTTPBasicCredentials}
    return check


def protected(passwords: Mapping[str, str] | None) -> list[Any]:
    """Returns the dependencies of routes that need a password; none where there are no passwords."""
    return [Depends(basic_auth(passwords))] if passwords else []
