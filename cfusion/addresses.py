"""Addresses of data and servers, whose secrets are never printed.

`str` of an address leaves out user, password and query, and so does everything that a run writes. Only the code that
connects uses `Address.reveal`. `cfusion.secret_text` does the same for the URLs in any text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SecretStr, WithJsonSchema

from cfusion.errors import ConfigError
from cfusion.secret_text import URL, without_secrets


@dataclass(frozen=True)
class Address:
    """A folder, or the URL of a folder, server or database; `str` has no secret.

    Attributes:
        secret: The address as it was given.
    """

    secret: SecretStr

    @classmethod
    def of(cls, text: object) -> Address:
        """Make an address of a text.

        Raises:
            ValueError: It is not a text, or the password of a URL has a character that ends it.
        """
        if isinstance(text, Address):
            return text
        if not isinstance(text, str):
            raise ValueError("expected a folder or a URL")
        found = URL.fullmatch(text.partition("#")[0])
        if found is not None and found["user"] and "@" in found["rest"]:
            raise ValueError("write @ and / of a password as %40 and %2F")
        return cls(SecretStr(text))

    def reveal(self) -> str:
        """Return the address as it was given, to connect to it."""
        return self.secret.get_secret_value()

    @property
    def has_secret(self) -> bool:
        """Whether its text shows less than was given."""
        return str(self) != self.reveal()

    def __str__(self) -> str:
        return without_secrets(self.reveal())

    def __repr__(self) -> str:
        return repr(str(self))


AddressSetting = Annotated[
    Address, BeforeValidator(Address.of), PlainSerializer(str), WithJsonSchema({"type": "string"})
]
"""A setting that is an address; it is written without its secret."""


def _one_or_several(value: Any) -> Address | tuple[Address, ...]:
    if not isinstance(value, list | tuple):
        return Address.of(value)
    several = tuple(map(Address.of, value))
    if not several:
        raise ValueError("expected a folder or a URL, or a list of them; the list is empty")
    if len(set(several)) < len(several):
        raise ValueError("one of the folders stands in the list twice")
    return several if len(several) > 1 else several[0]


def _written(value: Address | tuple[Address, ...]) -> str | list[str]:
    return [str(one) for one in value] if isinstance(value, tuple) else str(value)


_TEXT = {"type": "string"}
AddressesSetting = Annotated[
    Address | tuple[Address, ...], BeforeValidator(_one_or_several), PlainSerializer(_written),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}),
]  # fmt: skip
"""A setting that is an address or a list of several."""


def refuse_written(key: str, address: Address | None, where: str) -> None:
    """Refuse an address whose secret would be written to a file.

    Raises:
        ConfigError: It has a user, a password or a query.
    """
    if address is not None and address.has_secret:
        raise ConfigError(
            f"{key}={address}: the address holds a password, or a user or query, that would be written into {where}.",
            "Give it without. Put the credentials of https into ~/.netrc on the nodes, those of object stores into "
            "fsspec's configuration or the environment, and those of MLflow into MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD.",
            topic="access",
        )
