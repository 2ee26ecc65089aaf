"""Signatures (Ed25519) of manifests, and so of bundles: a manifest has the hash of every file.

They are the 64 bytes that `openssl pkeyutl -sign -rawin` writes too, and keys are files in PEM:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
"""

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
)

from models.errors import BundleError, PsimError

SIGNATURE = "manifest.sig"
BYTES = 64


def sign(manifest: Path, key: Path) -> Path:
    """Write the signature of a manifest beside it, by the private key in a file; return its path.

    Raises:
        PsimError: there is no such key, or nothing to sign.
    """
    private = _load(key, load_pem_private_key, None)
    if not isinstance(private, Ed25519PrivateKey):
        raise PsimError(f"{key} is no private key of Ed25519")
    signature = manifest.with_name(SIGNATURE)
    try:
        signature.write_bytes(private.sign(manifest.read_bytes()))
    except OSError as error:
        raise PsimError(f"{error.filename}: {error.strerror}") from error
    return signature


def check_signature(manifest: bytes, signature: Path, key: Path) -> None:
    """Raise `BundleError` unless the file has the signature of a manifest by a public key's owner.

    Raises:
        PsimError: there is no such public key.
    """
    public = _load(key, load_pem_public_key)
    if not isinstance(public, Ed25519PublicKey):
        raise PsimError(f"{key} is no public key of Ed25519")
    try:
        with signature.open("rb") as opened:
            public.verify(opened.read(BYTES + 1), manifest)
    except FileNotFoundError:
        raise BundleError(f"{signature.parent} is not signed; run `psim sign`") from None
    except OSError as error:
        raise BundleError(f"{signature} cannot be read: {error.strerror}") from error
    except InvalidSignature:
        raise BundleError(
            f"{signature.parent} is not signed by the owner of {key}, or was altered since"
        ) from None


def _load(key: Path, parse: Callable[..., object], *arguments: object) -> object:
    try:
        return parse(key.read_bytes(), *arguments)
    except OSError as error:
        raise PsimError(f"{key} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PsimError(f"{key} is no key in PEM, or has a password") from None
