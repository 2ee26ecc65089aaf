"""Ed25519 signatures of bundles. The manifest is signed, which holds the hash of every other file.

A signature is 64 bytes, as `openssl pkeyutl -sign -rawin` writes them too. Keys are PEM files:

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

from models.bundle.files import open_regular, read_small
from models.bundle.layout import SIGNATURE
from models.errors import BundleError, PsimError

SIGNATURE_BYTES = 64


def sign(manifest: Path, key: Path) -> Path:
    """Sign a manifest with the private key in a file; return the path of the signature beside it.

    Raises:
        PsimError: the key or the manifest cannot be read, or the signature cannot be written.
    """
    private = _load(key, load_pem_private_key, None)
    if not isinstance(private, Ed25519PrivateKey):
        raise PsimError(f"{key} is no private key of Ed25519")
    signature = manifest.with_name(SIGNATURE)
    try:
        signature.write_bytes(private.sign(read_small(manifest)))
    except OSError as error:
        raise PsimError(f"{error.filename}: {error.strerror}") from error
    return signature


def check_signature(manifest: bytes, signature: Path, key: Path) -> None:
    """Verify the signature of a manifest with a public key.

    Raises:
        BundleError: there is no signature, or not the right one.
        PsimError: there is no such public key.
    """
    public = _load(key, load_pem_public_key)
    if not isinstance(public, Ed25519PublicKey):
        raise PsimError(f"{key} is no public key of Ed25519")
    try:
        with open_regular(signature) as opened:
            public.verify(opened.read(SIGNATURE_BYTES + 1), manifest)
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
