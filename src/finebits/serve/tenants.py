"""Who may use which adapter. Names of adapters are a tenant's own: two may call theirs alike, and nobody learns what others have.

A file of keys holds for every key the adapters that its owner sees, by the names of their folders, in YAML or JSON; "*" is all of them:

    sk-of-alice: [formal, brief]
    sk-of-the-operator: ["*"]
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08: [poems]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finebits.errors import Invalid, WrongUse

ALL = "*"
HASHED = "sha256:"
SHORTEST = 8  # characters of a key


@dataclass(eq=False)
class Tenant:
    """`folders` are those that it may load from (None: any), `names` its adapters by what it calls them, as the engine numbers them."""

    folders: frozenset[str] | None = None
    names: dict[str, int] = field(default_factory=dict)

    def may(self, folder: str) -> bool:
        return self.folders is None or folder in self.folders


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Tenants:
    """By the hashes of their keys: what is looked up is a hash, so the time that it takes says nothing of a key. Without keys there is one
    tenant, who sees all.

    >>> tenants = Tenants({"sk-of-alice": ["formal"]})
    >>> tenants.of("sk-of-alice").folders, tenants.of("sk-of-mallory"), Tenants(None).of(None).folders
    (frozenset({'formal'}), None, None)
    """

    def __init__(self, keys: Mapping[str, Any] | None) -> None:
        self.open = Tenant() if keys is None else None
        self.by: dict[str, Tenant] = {}
        for i, (key, folders) in enumerate((keys or {}).items(), 1):
            if (
                not isinstance(key, str)
                or len(key) < SHORTEST
                or not isinstance(folders, list)
                or not all(isinstance(f, str) for f in folders)
            ):
                raise Invalid(
                    f"entry {i} of the keys is to be a key of at least {SHORTEST} characters with a list of names of adapters, such as "
                    "sk-of-alice: [formal, brief]"
                )
            hashed = key.removeprefix(HASHED).lower() if key.startswith(HASHED) else digest(key)
            self.by[hashed] = Tenant(None if ALL in folders else frozenset(folders))

    @classmethod
    def read(cls, file: Path | None) -> Tenants:
        """Of a file of keys. Raises ValueError where it is none."""
        if file is None:
            return cls(None)
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise WrongUse(
                f"{file} cannot be read as YAML or JSON ({type(e).__name__}): it holds keys, each with a list of adapters"
            ) from None
        if not isinstance(found, dict) or not found:
            raise Invalid(f"{file} holds no keys: write one a line, such as sk-of-alice: [formal, brief]")
        return cls(found)

    def of(self, key: str | None) -> Tenant | None:
        """Whose a key is; nobody's is None."""
        return self.open or (self.by.get(digest(key)) if key else None)

    def give(self, folder: str, number: int) -> None:
        """An adapter of the folder that the server began with, to all who may see it."""
        for tenant in [self.open] if self.open else self.by.values():
            if tenant.may(folder):
                tenant.names[folder] = number

    def held(self, number: int) -> bool:
        """Does anybody still have it?"""
        return any(number in tenant.names.values() for tenant in ([self.open] if self.open else self.by.values()))


def inside(root: Path, path: str) -> tuple[Path, str]:
    """(the folder, its first part under the root) of a path that a client names. Raises ValueError where it leads out of `root`, by `..`, by a
    link, or by being absolute and elsewhere, or where there is nothing."""
    try:
        top, at = root.resolve(), (root / path).resolve()
        parts = at.relative_to(top).parts
    except (ValueError, OSError, RuntimeError):
        parts = ()
    if not parts or not at.is_dir():
        raise Invalid("lora_path names no folder among the adapters of this server")
    return at, parts[0]
