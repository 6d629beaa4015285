"""Who a bundle is from: a detached signature in the OpenSSF Model Signing format, checked against a public key."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

from export.base.errors import ExportError, MissingDependency, first_line


def signature_path(bundle: Path) -> Path:
    """Beside the folder: in it, every file is listed in the manifest, which the signature covers."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.sig")


def check_signature(bundle: Path, public_key: Path) -> None:
    """Check that the holder of a key signed every file of a bundle as it is now, and no other file is there.

    Args:
        bundle: its folder; nothing of it is interpreted.
        public_key: of an elliptic curve, in PEM.

    Raises:
        MissingDependency: the library that reads the format is not installed.
        ExportError: there is no signature, it is by another key, or a file was changed, added or removed.
    """
    signing, path = _import_library(), signature_path(bundle)
    if not path.is_file():
        raise ExportError(f"{path}: expected the signature of {bundle}, there is none")
    try:
        config = signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # those of cryptography share no base class
        raise ExportError(f"{public_key}: expected a public key in PEM ({first_line(error)})") from error
    try:
        with redirect_stdout(sys.stderr):  # where it prints warnings
            config.verify(bundle.resolve(), path)
    except Exception as error:  # of the library, of pydantic and of cryptography
        raise ExportError(f"{path}: not the signature of {bundle} by {public_key} ({first_line(error)})") from error


def _import_library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise MissingDependency("model_signing", "sign", error) from error
    return model_signing
