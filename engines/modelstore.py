"""The model store on disk: one folder a digest, filled by copying, never changed afterwards.

    <models>/<digest>/           the files, read-only
    <models>/<digest>.json       the manifest (`engines.model.Model`)
    <models>/.incoming-*/        being copied; a lock on the folder says whether anyone still does

    inspect(folder) → Package    reads config, index and headers; refuses what can't be served; writes nothing
    put(package, …) → Model      copies and hashes in one pass, inspects the copy, renames it to its digest
    read, verify, remove

The renames make a model exist, so a crash leaves at most an `.incoming-*` folder, which the next `put` sweeps away.
Everything here blocks: call it in a thread. Nothing from a folder is ever imported, unpickled or run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from engines import packaging
from engines.errors import ModelInvalid, NotFound
from engines.model import Model, ModelDigest, ModelFile
from engines.packaging import Facts
from engines.safetensors import PREFIX_BYTES, Header, header_bytes, read_header

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all. What it raises ends the work, and nothing is left behind."""

_CHUNK = 4 << 20
_MAX_CONFIG = 64 << 20
_INCOMING = ".incoming-"


class Package(Struct, frozen=True):
    """A folder that was found to be a model."""

    folder: Path
    sizes: dict[str, int]
    """Its files that belong to the model, with their bytes."""
    facts: Facts

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


def inspect(folder: Path) -> Package:
    """Read what is needed to know whether the folder is a model that we can host; raises `ModelInvalid`."""
    listing = _listing(folder)
    choice = packaging.choose(listing)
    index = _content(folder / choice.index) if choice.index is not None else None
    weights = packaging.weight_files(choice, index, listing)
    headers = {file: _header(folder / file) for file in weights}
    packaging.check_index(choice, index, headers)
    configs = {file: _content(folder / file) for file in packaging.CONFIGS if file in listing}
    files = (*choice.others, *weights, *((choice.index,) if choice.index else ()))
    return Package(folder, {file: listing[file] for file in files}, packaging.survey(configs, headers, listing))


def put(package: Package, models: Path, *, name: str, source: str, progress: Progress) -> Model:
    """Copy a package into the store under its digest and return its manifest.

    A model that is there already is kept, unless its files have lost bytes. Raises `ModelInvalid` if the folder changed
    meanwhile, `OSError` if the disk is too small.
    """
    models.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(models).free
    if free < package.size:
        reason = f"the model needs {package.size:,} bytes and {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(models))
    with incoming(models) as folder:
        files = _copy(package, folder, progress)
        facts = inspect(folder).facts
        model = packaging.manifest(name, source, facts, files)
        target = models / model.digest
        if target.exists() and not _sizes_match(target, model):
            target.rename(folder / "damaged")
        _publish(folder, target)
        _write_manifest(folder, _manifest_path(models, model.digest), model)
    return model


def read(models: Path, digest: ModelDigest, *, name: str) -> Model:
    """The manifest of a model in the store, under this name; `NotFound` if it isn't there or has lost bytes."""
    try:
        model = msgspec.json.decode(_manifest_path(models, digest).read_bytes(), type=Model)
    except (OSError, msgspec.DecodeError):
        raise NotFound(f"model {digest} is not in the store; add it with `greenroom models add`") from None
    if model.digest != digest or packaging.digest(model.files) != digest:
        raise NotFound(f"model {digest}: its manifest in the store is damaged; add the model again")
    if not _sizes_match(models / digest, model):
        raise NotFound(f"model {digest}: files are missing from the store or cut short; add the model again")
    return msgspec.structs.replace(model, name=name)


def verify(models: Path, model: Model, progress: Progress) -> None:
    """Hash every file of a model in the store; `ModelInvalid` names the first that isn't what it was."""
    done, total = 0, sum(file.size for file in model.files)
    for file in model.files:
        path = models / model.digest / file.path
        hashed = hashlib.sha256()
        try:
            with path.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    hashed.update(chunk)
                    done += len(chunk)
                    progress(done, total)
        except OSError as error:
            raise ModelInvalid(f"{file.path}: {error.strerror}", field=file.path) from None
        if hashed.hexdigest() != file.sha256:
            raise ModelInvalid(f"{file.path}: its content is not what was added", field=file.path)


def remove(models: Path, digest: ModelDigest) -> None:
    """Take a model's files away; nothing happens if there are none."""
    _manifest_path(models, digest).unlink(missing_ok=True)
    if (models / digest).exists():
        with incoming(models) as doomed:
            (models / digest).rename(doomed / digest)


@contextmanager
def incoming(models: Path) -> Iterator[Path]:
    """A locked folder of one's own in the store; gone afterwards with all that is still in it.

    The store is locked while it is made, so that nobody sweeps it away before it has its lock.
    """
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models):
        _sweep(models)
        folder = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=models))
        lock = _open_folder(folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _listing(folder: Path) -> dict[str, int]:
    """The regular files of a folder with their sizes. A link may stay inside it, but not lead out."""
    if not folder.is_dir():
        reason = "neither a folder nor a .gguf file" if folder.exists() else "no such folder or file"
        raise ModelInvalid(f"{folder.name or folder}: {reason}", field=folder.name)
    root = folder.resolve()
    sizes = {}
    for entry in sorted(folder.iterdir()):
        try:
            if entry.is_symlink() and not entry.resolve(strict=True).is_relative_to(root):
                reason = "a link that leaves the folder; copy the model with `cp -rL` and add the copy"
                raise ModelInvalid(f"{entry.name}: {reason}", field=entry.name)
            status = entry.stat()
        except OSError as error:
            raise ModelInvalid(f"{entry.name}: {error.strerror}", field=entry.name) from None
        if stat.S_ISREG(status.st_mode):
            sizes[entry.name] = status.st_size
    return sizes


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise ModelInvalid(f"{path.name}: {error.strerror}", field=path.name) from None
    if len(content) > _MAX_CONFIG:
        raise ModelInvalid(f"{path.name}: too large to be what its name says", field=path.name)
    return content


def _header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_bytes(file.read(PREFIX_BYTES), size, path.name)
            return read_header(file.read(length), size, path.name)
    except OSError as error:
        raise ModelInvalid(f"{path.name}: {error.strerror}", field=path.name) from None


def _copy(package: Package, target: Path, progress: Progress) -> list[ModelFile]:
    """Copy a package's files, hashing what is written."""
    done, files = 0, []
    for name, size in package.sizes.items():
        hashed, written = hashlib.sha256(), 0
        try:
            source = (package.folder / name).open("rb")
        except OSError as error:
            raise ModelInvalid(f"{name}: {error.strerror}", field=name) from None
        with source, (target / name).open("xb") as copy:
            while chunk := source.read(_CHUNK):
                hashed.update(chunk)
                copy.write(chunk)
                written += len(chunk)
                progress(done + written, package.size)
            copy.flush()
            os.fsync(copy.fileno())
        if written != size:
            raise ModelInvalid(f"{name}: changed while it was copied", field=name)
        (target / name).chmod(0o444)
        done += written
        files.append(ModelFile(name, written, hashed.hexdigest()))
    return files


def _publish(copied: Path, target: Path) -> None:
    """Give the copied files their final place, all at once and durably, unless equal ones are there."""
    complete = copied / "complete"
    complete.mkdir(mode=0o755)
    for file in [entry for entry in copied.iterdir() if entry.is_file()]:
        file.rename(complete / file.name)
    _sync(complete)
    try:
        complete.rename(target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    _sync(target.parent)


def _write_manifest(folder: Path, path: Path, model: Model) -> None:
    draft = folder / "manifest"
    with draft.open("xb") as file:
        file.write(msgspec.json.encode(model))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync(path.parent)


def _manifest_path(models: Path, digest: ModelDigest) -> Path:
    return models / f"{digest}.json"


def _sizes_match(folder: Path, model: Model) -> bool:
    try:
        return all((folder / file.path).stat().st_size == file.size for file in model.files)
    except OSError:
        return False


def _sync(folder: Path) -> None:
    descriptor = _open_folder(folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _open_folder(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(models: Path) -> None:
    """Take away what earlier copies left when they were killed: folders that nobody has locked."""
    for folder in models.glob(f"{_INCOMING}*"):
        try:
            descriptor = _open_folder(folder)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
