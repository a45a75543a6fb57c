"""Copies of full checkpoints between a local directory and a remote one, for programs that read local files only."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from polyshard.checkpoint.directory import begin, behind_link, find, publish, staging_name
from polyshard.checkpoint.location import as_path, file_system, is_remote, key, local_path
from polyshard.checkpoint.manifest import MANIFEST, read_manifest, verify_files
from polyshard.checkpoint.remote.publish import Upload, begin_upload, commit, remote_files, upload, withdraw
from polyshard.core.errors import CheckpointError
from polyshard.core.ranks import Ranks

_THREADS = 8


def download_checkpoint(url: str | Path, directory: str | Path) -> Path:
    """Copy a checkpoint or any other directory from a remote file system to a local one, atomically.

    Use it for programs that read local files, such as vLLM and tokenizers. `load_checkpoint` and `load_training_state`
    take the URL itself, and transfer less. Not a collective: call it once on each machine.

    Args:
        url: a URL of fsspec, such as `s3://bucket/runs/a/step-00000100`.
        directory: the local target. A checkpoint there is replaced; other files are kept.

    Returns:
        The directory.

    Raises:
        CheckpointError: there is nothing at the URL, a save to it has not finished, a file differs from the checksum in
            the manifest, or the target cannot be written. The target is then unchanged.

    Examples:
        >>> context = ps.initialize("torch")
        >>> saved = ps.save_checkpoint(torch.nn.Linear(2, 2), "memory://bucket/model", context, config={})
        >>> sorted(path.name for path in download_checkpoint("memory://bucket/model", "model").iterdir())
        ['config.json', 'model.safetensors', 'polyshard.json']
    """
    source, target = find(url), behind_link(local_path(directory, "directory"))
    if not is_remote(source):
        raise CheckpointError(f"url must be of a remote file system: got {url}. Use the directory itself.")
    fs = file_system(source)
    names = remote_files(source) if source.is_dir() else []
    if not names:
        raise CheckpointError(f"{source} is not a directory")
    staging = target.parent / staging_name(target)
    try:
        begin(target, staging)
        for name in names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: fs.get_file(key(source / name), str(staging / name)), names))
        manifest = read_manifest(staging)
        if manifest is not None:
            verify_files(staging, manifest, Ranks())
        publish(staging, target)
    except OSError as error:
        raise CheckpointError(f"copying {source} to {target} failed; nothing was changed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def upload_checkpoint(directory: str | Path, url: str | Path) -> Path:
    """Copy a local checkpoint to a remote file system, atomically. Not a collective.

    Args:
        directory: a directory with a manifest: written by polyshard.
        url: the target, a URL of fsspec. A checkpoint there is replaced; other files are kept.

    Returns:
        The target, as a `UPath`.

    Raises:
        CheckpointError: the directory has no manifest, or a file differs from its checksum there; or the target cannot
            be written.

    Examples:
        >>> context = ps.initialize("torch")
        >>> saved = ps.save_checkpoint(torch.nn.Linear(2, 2), "model", context, config={})
        >>> uploaded = upload_checkpoint(saved, "memory://bucket/model")
        >>> ps.load_checkpoint(torch.nn.Linear(2, 2), uploaded, context)
    """
    source, target = local_path(find(directory), "directory"), as_path(url)
    if not is_remote(target):
        raise CheckpointError(f"url must be of a remote file system: got {url}. Copy the directory.")
    manifest = read_manifest(source) if source.is_dir() else None
    if manifest is None:
        raise CheckpointError(f"{source} is not a checkpoint of polyshard: {MANIFEST} is missing. Convert it first.")
    verify_files(source, manifest, Ranks())
    started: Upload | None = None
    try:
        started = begin_upload(target, staging_name(target), manifest.files)
        commit(started, manifest, upload(source, manifest.files, started))
    except OSError as error:
        raise CheckpointError(f"copying {source} to {target} failed; nothing was changed: {error}") from error
    finally:
        if started is not None:
            withdraw(started)
    return target
