"""A save to a remote file system: each rank writes its own files, and none needs to see those of another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from polyshard.checkpoint.directory import begin, staging_name
from polyshard.checkpoint.manifest import FileRecord, Manifest, checksums, joined
from polyshard.checkpoint.remote.exchange import write_files, writers
from polyshard.checkpoint.remote.publish import begin_upload, commit, upload, withdraw
from polyshard.checkpoint.storage import Progress, rectangles
from polyshard.core.errors import RankFailureError
from polyshard.core.ranks import Ranks

if TYPE_CHECKING:
    from polyshard.checkpoint.save import SaveJob

_SECONDS = 2.0  # between two looks at whether all ranks have uploaded their files


def save_remotely(
    job: SaveJob, ranks: Ranks, tensor_rank: int, tensor_size: int, progress: Progress | None = None
) -> Path:
    """Save a checkpoint to a remote directory. A collective, over a group of gloo.

    Each file is put together on one rank's local disk, in the directory for temporary files, and then uploaded by it.

    Raises:
        CheckpointError: a rank could not write or upload; raised on every rank.
        RankFailureError: a rank crashed, hung, or cannot be reached.
    """
    target = job.directory
    what = f"saving {target} failed; nothing was changed"
    folder = ranks.run_on_all(_local_folder, what)
    prefix: Path | None = None
    try:
        held = list(rectangles(job.pieces, job.table, tensor_rank, tensor_size))
        fingerprints = write_files(folder, job.files, writers(job.files, ranks), held, ranks, what, progress)

        def prepared() -> tuple[dict[str, FileRecord], Path | None]:
            if ranks.rank == 0:
                job.add_documents(folder)
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            records = checksums(folder, dict.fromkeys(names, "blake3"))
            return records, begin_upload(target, staging_name(target)) if ranks.rank == 0 else None

        mine, prefix = ranks.run_on_all(prepared, what)
        name = ranks.broadcast(None if prefix is None else prefix.name)
        _together(lambda: upload(folder, list(mine), target.parent / name), ranks, what)
        manifest = job.manifest(joined(ranks.gather(mine)), fingerprints)
        _together(lambda: _commit(prefix, target, manifest), ranks, what)
        prefix = None
        return target
    except RankFailureError:
        prefix = None  # other ranks may still be uploading: the marker must stay, and the next save removes the files
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if prefix is not None:
            withdraw(prefix)


def _local_folder() -> Path:
    """Create a folder on the local disk, and remove those that killed saves left there."""
    root = Path(tempfile.gettempdir()) / "polyshard"
    folder = root.parent / staging_name(root)
    begin(root, folder)
    folder.chmod(0o700)
    return folder


def _commit(prefix: Path | None, target: Path, manifest: Manifest) -> None:
    if prefix is not None:  # rank 0
        commit(prefix, target, manifest)


def _together(action: Callable[[], None], ranks: Ranks, what: str) -> None:
    """Run `action` on all ranks, which may take longer than the timeout of their collectives."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(action)
        while not all(ranks.gather(running.done())):
            wait([running], timeout=_SECONDS)
    error = running.exception()
    ranks.raise_on_all(error if isinstance(error, Exception) else None, what)
