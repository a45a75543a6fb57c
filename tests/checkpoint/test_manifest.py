"""Checksums of the manifest: BLAKE3 is written, and SHA-256 of earlier versions is still compared."""

import hashlib
import json

import pytest

import polyshard as ps
from polyshard.checkpoint.manifest import Manifest, read_manifest, record_files, verify_files, write_manifest
from polyshard.core.ranks import Ranks

# Published with BLAKE3: of no bytes, and of "abc".
KNOWN = {
    "empty": (b"", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
    "abc": (b"abc", "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
}


@pytest.fixture
def directory(tmp_path):
    for name, (content, _) in KNOWN.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change_a_byte(path):
    path.write_bytes(b"abd")


def test_files_are_recorded_by_their_blake3(directory):
    write_manifest(
        directory, Manifest(kind="weights", files=record_files(directory, Ranks()), fingerprints={"weight": {}})
    )
    written = json.loads((directory / "polyshard.json").read_text())
    assert written["version"] == 2
    assert written["files"] == {
        name: {"bytes": len(content), "blake3": digest} for name, (content, digest) in KNOWN.items()
    }
    verify_files(directory, read_manifest(directory), Ranks())
    change_a_byte(directory / "abc")
    with pytest.raises(ps.CheckpointError, match="is damaged: the checksum of abc is not the recorded one"):
        verify_files(directory, read_manifest(directory), Ranks())


def test_a_manifest_of_version_1_is_compared_by_its_sha256(directory):
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, (content, _) in KNOWN.items()
    }
    fields = {"kind": "weights", "files": files, "fingerprints": {"weight": {}}, "state": {}, "version": 1}
    (directory / "polyshard.json").write_text(json.dumps(fields))
    verify_files(directory, read_manifest(directory), Ranks())
    change_a_byte(directory / "abc")
    with pytest.raises(ps.CheckpointError, match="is damaged: the checksum of abc"):
        verify_files(directory, read_manifest(directory), Ranks())


def test_an_unknown_checksum_is_refused(directory):
    fields = {"kind": "weights", "files": {"abc": {"bytes": 3, "md5": "0"}}, "fingerprints": {}, "version": 2}
    (directory / "polyshard.json").write_text(json.dumps(fields))
    with pytest.raises(ps.CheckpointError, match="unknown checksum in .*'md5'"):
        read_manifest(directory)
