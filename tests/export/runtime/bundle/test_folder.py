"""The bundle: whole or not there, and every change to it is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from export.base.errors import ExportError
from export.runtime.bundle.folder import MANIFEST, _manifest_bytes, publish, read_verified, staged

OLD = {"a.bin": b"old" * 100, "b.bin": b"b"}
NEW = {"a.bin": b"new" * 1000, "c.bin": bytes(range(256))}


def write(output: Path, files: dict[str, bytes], **facts: object) -> None:
    with staged(output) as staging:
        publish(staging, output, files, {"format": 1, **facts})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write(tmp_path / "bundle", OLD, name="x")
    return tmp_path / "bundle"


def test_a_bundle_exchanged_while_it_is_read_is_read_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "b.bin":
            monkeypatch.setattr(Path, "read_bytes", real)
            write(bundle, NEW, name="y")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    manifest, contents = read_verified(bundle)
    assert contents == NEW and manifest["name"] == "y"


@pytest.mark.parametrize("name", [*OLD, MANIFEST])
def test_every_flipped_bit_is_noticed_and_the_file_named(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 60)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            (bundle / name).write_bytes(changed)
            with pytest.raises(ExportError, match=name.replace(".", r"\.")):
                read_verified(bundle)
    (bundle / name).write_bytes(content)
    read_verified(bundle)


def replace_by_link(path: Path) -> None:
    """To the same content, outside."""
    path.symlink_to(path.rename(path.parents[1] / path.name))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda b: (b / "a.bin").unlink(), "a.bin: missing"),
    "unlisted file": (lambda b: (b / "evil.so").write_bytes(b""), "evil.so: not listed"),
    "hidden file": (lambda b: (b / ".evil").write_bytes(b""), r"\.evil: not listed"),
    "pipe": (lambda b: os.mkfifo(b / "evil"), "evil: expected a plain file"),
    "truncated": (lambda b: (b / "a.bin").write_bytes(b"old"), "a.bin: 3 bytes, expected 300"),
    "link": (lambda b: replace_by_link(b / "b.bin"), "b.bin: expected a plain file"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), "expected a bundle"),
    "manifest a link": (lambda b: replace_by_link(b / MANIFEST), "expected a bundle"),
    "manifest of another kind": (lambda b: (b / MANIFEST).write_text("[1, 2]"), "changed since it was written"),
    "nested manifest": (lambda b: (b / MANIFEST).write_text("[" * 100_000), "changed since it was written"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_bundle_is_refused(bundle: Path, case: str) -> None:
    tamper, message = TAMPERED[case]
    tamper(bundle)
    with pytest.raises(ExportError, match=message) as error:
        read_verified(bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "."])
def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / MANIFEST).write_bytes(_manifest_bytes({name: b"x"}, {}))
    with pytest.raises(ExportError, match="is not the name of a file in the bundle"):
        read_verified(tmp_path)


FOREIGN: dict[str, dict[str, str]] = {
    "no manifest": {"photo.jpg": "dear"},
    "a manifest of something else": {MANIFEST: '{"name": "my extension", "files": []}', "src.js": "mine"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, case: str) -> None:
    """It appears while the bundle is written."""
    contents, output = FOREIGN[case], tmp_path / "mine"
    with pytest.raises(ExportError, match="is not a bundle"), staged(output) as staging:
        output.mkdir()
        for name, text in contents.items():
            (output / name).write_text(text)
        publish(staging, output, NEW, {})
    assert {path.name: path.read_text() for path in output.iterdir()} == contents


def test_what_is_the_users_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    (bundle / "notes.txt").write_text("dear")
    with pytest.raises(ExportError, match=r"holds notes\.txt, which is not part of the bundle"):
        write(bundle, NEW)
    assert (bundle / "notes.txt").read_text() == "dear"
    (tmp_path / "file").write_bytes(b"dear")
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "file" / "bundle", NEW)


def test_a_writer_that_fails_leaves_no_folders_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="no reason"), staged(tmp_path / "mine" / "build" / "r" / "bundle"):
        raise ExportError("no reason")
    assert not [*(tmp_path / "mine").iterdir()]
    write(tmp_path / "mine" / "build" / "bundle", OLD)
    assert [*(tmp_path / "mine").rglob("a.bin")]
