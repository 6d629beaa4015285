"""Signatures of bundles: made by the library's own command, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from export import ExportError, MissingDependency
from export.runtime.bundle.folder import publish, read_verified, staged
from export.runtime.bundle.signature import check_signature, signature_path
from tests import children


def save_public(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, path: Path) -> Path:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key, with its public one beside it as `public.pem`."""
    path, key = tmp_path_factory.mktemp("key") / "private.pem", ec.generate_private_key(ec.SECP256R1())
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    save_public(key, path.with_name("public.pem"))
    return path


@pytest.fixture(scope="module")
def public(key: Path) -> Path:
    return key.with_name("public.pem")


@pytest.fixture(scope="module")
def signed(key: Path) -> Path:
    """A bundle with its signature, made by the command in docs/deploy.md."""
    bundle, sign = key.with_name("bundle"), [sys.executable, "-m", "model_signing", "sign", "key"]
    with staged(bundle) as staging:
        publish(staging, bundle, {"a.bin": b"a" * 100, "b.bin": b"b"}, {"format": 1})
    process = children.run([*sign, bundle, "--private_key", key, "--signature", signature_path(bundle)])
    assert process.returncode == 0, process.stderr
    return bundle


@pytest.fixture
def bundle(signed: Path, tmp_path: Path) -> Path:
    """A copy."""
    shutil.copy(signature_path(signed), tmp_path)
    return Path(shutil.copytree(signed, tmp_path / "bundle"))


def test_a_signed_bundle_is_accepted_however_it_is_reached(
    bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_signature(bundle, public)
    (bundle.parent / "link").symlink_to(bundle)
    check_signature(bundle.parent / "link", public)
    monkeypatch.chdir(bundle)
    check_signature(Path(), public)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (lambda b: (b / "a.bin").write_bytes(b"x" * 100), "Hash mismatch for 'a.bin'"),
    "an added file": (lambda b: (b / "c.bin").touch(), "Extra files found .*c.bin"),
    "no signature": (lambda b: signature_path(b).unlink(), "expected the signature of .*, there is none"),
    "an empty signature": (lambda b: signature_path(b).write_bytes(b""), "not the signature of"),
    "a signature of another form": (lambda b: signature_path(b).write_text('{"mediaType": 1}'), "not the signature of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_not_signed_is_refused_in_one_line(case: str, bundle: Path, public: Path) -> None:
    change, message = WRONG[case]
    change(bundle)
    with pytest.raises(ExportError, match=message) as error:
        check_signature(bundle, public)
    assert str(error.value).startswith(f"{signature_path(bundle)}: ") and "\n" not in str(error.value)


def test_what_signatures_leave_out_is_refused_as_not_listed(bundle: Path, public: Path) -> None:
    """The files of git, which the library leaves out as it signs: the manifest, which is signed, does not have them."""
    (bundle / ".gitignore").touch()
    check_signature(bundle, public)
    with pytest.raises(ExportError, match=r"\.gitignore: not listed"):
        read_verified(bundle)


def test_a_signature_by_another_key_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = save_public(ec.generate_private_key(ec.SECP256R1()), tmp_path / "other.pem")
    with pytest.raises(ExportError, match=rf"bundle\.sig: not the signature of {bundle} by {other} \("):
        check_signature(bundle, other)


def test_what_the_library_prints_is_no_result(bundle: Path, public: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It warns of signatures that do not say which key they are by, as old ones."""
    path = signature_path(bundle)
    record = json.loads(path.read_bytes())
    record["verificationMaterial"]["publicKey"]["hint"] = ""
    path.write_text(json.dumps(record))
    check_signature(bundle, public)
    out, error = capsys.readouterr()
    assert out == "" and "WARNING" in error


@pytest.mark.parametrize("kind", ["missing", "private", "RSA"])
def test_what_is_no_public_key_is_refused(kind: str, bundle: Path, key: Path, tmp_path: Path) -> None:
    path = key if kind == "private" else tmp_path / "key.pem"
    if kind == "RSA":
        save_public(rsa.generate_private_key(65537, 2048), path)
    with pytest.raises(ExportError, match=f"^{path}: expected a public key in PEM ") as error:
        check_signature(bundle, path)
    assert "\n" not in str(error.value)


def test_without_the_library_the_extra_is_named(bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependency, match=r"model_signing is not installed; .*\[sign\]"):
        check_signature(bundle, public)
