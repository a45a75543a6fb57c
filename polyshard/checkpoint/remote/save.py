"""A save to a remote file system: each rank writes its own files, and none needs to see those of another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from polyshard.checkpoint.directory import begin, staging_name
from polyshard.checkpoint.files import INDEX
from polyshard.checkpoint.manifest import FileRecord, checksums, joined
from polyshard.checkpoint.remote.exchange import write_files, writers
from polyshard.checkpoint.remote.identity import Identity
from polyshard.checkpoint.remote.publish import Upload, begin_upload, commit, upload, withdraw
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
    started: Upload | None = None
    try:
        held = list(rectangles(job.pieces, job.table, tensor_rank, tensor_size))
        fingerprints = write_files(folder, job.files, writers(job.files, ranks), held, ranks, what, progress)

        def prepared() -> tuple[dict[str, FileRecord], Upload | None]:
            if ranks.rank == 0:
                job.add_documents(folder)
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            records = checksums(folder, dict.fromkeys(names, "blake3"))
            weights = [INDEX, *(file.path for file in job.files)]
            return records, begin_upload(target, staging_name(target), weights) if ranks.rank == 0 else None

        mine, started = ranks.run_on_all(prepared, what)
        name, in_place = ranks.broadcast(None if started is None else (started.name, started.in_place))
        to = Upload(target, name, in_place)
        written: dict[str, Identity] = {}
        _together(lambda: written.update(upload(folder, mine, to)), ranks, what)
        manifest = job.manifest(joined(ranks.gather(mine)), fingerprints)
        everywhere = {name: one for part in ranks.gather(written) for name, one in part.items()}
        _together(lambda: commit(to, manifest, everywhere) if ranks.rank == 0 else None, ranks, what)
        started = None
        return target
    except RankFailureError:
        started = None  # other ranks may still be uploading: the marker must stay, and the next save removes the files
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if started is not None:
            withdraw(started)


def _local_folder() -> Path:
    """Create a folder on the local disk, and remove those that killed saves left there."""
    root = Path(tempfile.gettempdir()) / "polyshard"
    folder = root.parent / staging_name(root)
    begin(root, folder)
    folder.chmod(0o700)
    return folder


def _together(action: Callable[[], None], ranks: Ranks, what: str) -> None:
    """Run `action` on all ranks, which may take longer than the timeout of their collectives."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(action)
        while not all(ranks.gather(running.done())):
            wait([running], timeout=_SECONDS)
    error = running.exception()
    ranks.raise_on_all(error if isinstance(error, Exception) else None, what)
