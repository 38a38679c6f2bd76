from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import safetensors, write_model

from engines.errors import ModelInvalid, NotFound
from engines.model import Model, ModelDigest
from engines.modelstore import inspect, put, read, remove, verify


def quiet(_done: int, _total: int) -> None:
    pass


def add(folder: Path, models: Path, name: str = "tiny") -> Model:
    return put(inspect(folder), models, name=name, source=str(folder), progress=quiet)


def entries(models: Path) -> set[str]:
    return {entry.name for entry in models.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "a model")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


def test_a_model_is_copied_under_its_digest_and_can_be_read_back(folder: Path, models: Path) -> None:
    seen: list[tuple[int, int]] = []
    package = inspect(folder)
    model = put(package, models, name="tiny", source="here", progress=lambda done, total: seen.append((done, total)))

    assert entries(models) == {model.digest, f"{model.digest}.json"}
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert entries(models / model.digest) == names
    assert {file.path for file in model.files} == names
    assert seen[-1] == (package.size, package.size)
    assert read(models, model.digest, name="tiny") == model
    assert read(models, model.digest, name="other").name == "other"
    verify(models, model, quiet)


def test_equal_content_is_stored_once_whatever_its_folder_and_shards_are_another_model(
    folder: Path, models: Path, tmp_path: Path
) -> None:
    first = add(folder, models)
    second = add(write_model(tmp_path / "elsewhere"), models)
    sharded = add(write_model(tmp_path / "sharded", shards=True), models)
    assert first.digest == second.digest != sharded.digest
    assert first.weights_bytes == sharded.weights_bytes
    assert len(sharded.files) == 7


def test_pickles_and_code_beside_safetensors_stay_outside(folder: Path, models: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    model = add(folder, models)
    assert not {"pytorch_model.bin", "modeling_tiny.py"} & entries(models / model.digest)


def test_a_link_within_the_folder_is_followed(folder: Path, models: Path) -> None:
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    model = add(folder, models)
    stored = models / model.digest / "model.safetensors"
    assert stored.is_file()
    assert not stored.is_symlink()


def link_out(folder: Path) -> None:
    outside = folder.parent / "secret"
    outside.write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(outside)


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    write_model(folder, shards=True)
    (folder / "model-00002-of-00003.safetensors").unlink()


def swapped_shards(folder: Path) -> None:
    write_model(folder, shards=True)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")


def custom_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "a config that is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: missing",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors: missing; the folder has no weights",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a missing shard": (
        missing_shard,
        "model-00002-of-00003.safetensors: missing; model.safetensors.index.json names it",
    ),
    "a shard with other tensors": (swapped_shards, "model-00002-of-00003.safetensors: tensor 'layer' is missing"),
    "a corrupt header": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors().replace(b"BF16", b"BF99", 1)),
        "model.safetensors: tensor 'embed' has the unknown dtype 'BF99'",
    ),
    "a header of noise": (
        lambda f: (f / "model.safetensors").write_bytes(os.urandom(7) + b"\xff" + os.urandom(500)),
        "model.safetensors: corrupt header, or no safetensors file",
    ),
    "an empty file of weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors: 0 bytes are too few",
    ),
    "a file cut short": (cut_short, "model.safetensors: corrupt or cut short"),
    "pickles only": (pickle_only, "pytorch_model.bin: pickled weights only"),
    "code of its own": (custom_code, "config.json: asks for code from the folder"),
    "a link that leaves it": (link_out, "tokenizer.json: a link that leaves the folder"),
    "a link to nothing": (lambda f: (f / "x").symlink_to("gone"), "x: No such file or directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_in_one_line_that_names_the_file(name: str, folder: Path, models: Path) -> None:
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(ModelInvalid) as caught:
        add(folder, models)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not models.exists()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.zip").write_bytes(b"")
    with pytest.raises(ModelInvalid, match=r"^weights\.zip: neither a folder nor a \.gguf file"):
        inspect(tmp_path / "weights.zip")
    with pytest.raises(ModelInvalid, match=r"^gone: no such folder or file"):
        inspect(tmp_path / "gone")


def test_a_folder_that_changes_while_it_is_copied_is_refused_and_leaves_nothing(folder: Path, models: Path) -> None:
    package = inspect(folder)
    (folder / "model.safetensors").write_bytes(safetensors(fill=1) + b"more")
    with pytest.raises(ModelInvalid, match=r"^model\.safetensors: changed while it was copied"):
        put(package, models, name="tiny", source="", progress=quiet)
    assert entries(models) == set()


def test_an_interrupted_copy_leaves_nothing(folder: Path, models: Path) -> None:
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(inspect(folder), models, name="tiny", source="", progress=stop)
    assert entries(models) == set()


def _die_while_copying(folder: Path, models: Path) -> None:
    put(inspect(folder), models, name="t", source="", progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_i10_what_a_killed_copy_left_is_swept_by_the_next_and_a_running_one_is_not(
    folder: Path, models: Path, tmp_path: Path
) -> None:
    killed = multiprocessing.get_context("spawn").Process(target=_die_while_copying, args=(folder, models))
    killed.start()
    killed.join()
    (left,) = entries(models)
    assert left.startswith(".incoming-")

    other = write_model(tmp_path / "other", fill=1)
    inner: list[Model] = []
    outer = put(
        inspect(folder), models, name="a", source="", progress=lambda *_: inner or inner.append(add(other, models))
    )
    digests = {outer.digest, inner[0].digest}
    assert entries(models) == digests | {f"{digest}.json" for digest in digests}


def test_damage_in_the_store_is_found_and_adding_again_mends_it(folder: Path, models: Path) -> None:
    model = add(folder, models)
    stored = models / model.digest / "model.safetensors"

    stored.chmod(0o644)
    stored.write_bytes(safetensors(fill=7))
    assert read(models, model.digest, name="tiny") == model
    with pytest.raises(ModelInvalid, match=r"^model\.safetensors: its content is not what was added"):
        verify(models, model, quiet)

    stored.write_bytes(b"")
    with pytest.raises(NotFound, match="missing from the store or cut short"):
        read(models, model.digest, name="tiny")
    add(folder, models)
    verify(models, model, quiet)


def test_a_manifest_with_other_files_than_its_digest_is_not_believed(folder: Path, models: Path) -> None:
    model = add(folder, models)
    manifest = models / f"{model.digest}.json"
    manifest.write_bytes(manifest.read_bytes().replace(model.files[0].sha256.encode(), b"0" * 64))
    with pytest.raises(NotFound, match="its manifest in the store is damaged"):
        read(models, model.digest, name="tiny")


def test_a_removed_model_is_gone_and_removing_again_is_fine(folder: Path, models: Path) -> None:
    model = add(folder, models)
    remove(models, model.digest)
    remove(models, model.digest)
    assert entries(models) == set()
    with pytest.raises(NotFound, match="is not in the store"):
        read(models, ModelDigest(model.digest), name="tiny")
