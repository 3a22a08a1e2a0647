"""Checkpoints in folders of hub repositories: what a source names, what is downloaded, and what a refusal says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksweep.utils import hub
from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub_repository import hub_readings, needed_files
from tests.hub_server import Hub, HubRepository, serving_hub, use_hub

AV_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
AV = "iter_000400/av"
NOT_NEEDED = (
    "README.md", "optim_latest.pt", "run_config.yaml", "iter_000200/nla_meta.yaml", "iter_000200/av/adapter_model.safetensors",
    "iter_000400/nla_meta.yaml.bak", "iter_000400/ar/adapter_model.safetensors", f"{AV}/reference/adapter_model.safetensors",
    f"{AV}/adapter_model.bin", f"{AV}/adapter_model.safetensors.tmp", f"{AV}/adapter_config.json.old", f"{AV}/model.gguf",
    f"{AV}/model.onnx", f"{AV}/README.md", f"{AV}/optimizer.pt",
)  # fmt: skip
NEEDED = {"nla_meta.yaml", *(f"{AV}/{name}" for name in AV_FILES)}


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with serving_hub() as served:
        yield served


@pytest.fixture
def nla_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    files = {name: f"main {name}".encode() for name in (*NEEDED, *NOT_NEEDED)}
    older = {name: content.replace(b"main", b"older") for name, content in files.items()}
    served.repositories = {"owner/nla": HubRepository({"main": files, "v1": older, "feature/x": older, "refs/pr/1": older})}
    served.forget()
    use_hub(monkeypatch, served.endpoint, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return served


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(source: str) -> str:
    with pytest.raises(CheckpointError) as refused:
        hub.resolve(source, "AV checkpoint")
    return str(refused.value)


# --- what is downloaded ---


def test_a_folder_of_a_repository_brings_its_own_files_and_the_sidecars_above_and_no_others(nla_hub: Hub) -> None:
    path = hub.resolve("owner/nla/iter_000400/av", "AV checkpoint")
    root = hub.repository_root(path)
    assert root is not None and path == root / "iter_000400" / "av"
    assert nla_hub.asked_files() == NEEDED and files_below(root) == NEEDED
    assert (path / "tokenizer.json").read_bytes() == b"main iter_000400/av/tokenizer.json"


@pytest.mark.parametrize("revision", ["v1", "feature/x", "refs/pr/1"])
def test_a_revision_stands_before_the_folder_and_may_have_slashes(nla_hub: Hub, revision: str) -> None:
    path = hub.resolve(f"owner/nla@{revision}/iter_000400/av")
    assert (path / "tokenizer.json").read_bytes() == b"older iter_000400/av/tokenizer.json"
    commit = nla_hub.repositories["owner/nla"].commit_of(revision)
    assert hub.hub_spelling(path) == f"owner/nla@{commit}/iter_000400/av"
    nla_hub.forget()
    assert hub.resolve(f"owner/nla@{commit}/iter_000400/av") == path, "what a record says can be typed"
    assert not nla_hub.requests, "a commit does not change"


def test_what_the_cache_has_is_not_downloaded_again(nla_hub: Hub) -> None:
    path = hub.resolve("owner/nla/iter_000400/av")
    nla_hub.forget()
    assert hub.resolve("owner/nla/iter_000400/av") == path and not nla_hub.asked_files()


def test_a_file_of_a_repository_can_be_named(nla_hub: Hub) -> None:
    path = hub.resolve(f"owner/nla@v1/{AV}/optimizer.pt", "talkative-autoencoder checkpoint")
    assert path.read_bytes() == b"older iter_000400/av/optimizer.pt"
    assert nla_hub.asked_files() == {"nla_meta.yaml", f"{AV}/optimizer.pt"}


def test_a_branch_that_moves_during_the_download_is_said(nla_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = nla_hub.repositories["owner/nla"]
    before, after = repository.revisions["main"], {"iter_000400/av/other.json": b""}
    monkeypatch.setattr(nla_hub, "on_request", lambda: repository.revisions.update(main=after if nla_hub.requests else before))
    assert "changed on the hub while it was downloaded: run the same command again" in refusal(f"owner/nla/{AV}")


def test_of_several_formats_safetensors_are_needed_and_without_them_the_others() -> None:
    both = ["config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "layer_means.pt"]
    assert needed_files(both) == ["config.json", "layer_means.pt", "model.safetensors"]
    assert needed_files(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    assert needed_files(["a/chat_template.jinja", "a/additional_chat_templates/tools.jinja", "a/b/config.json"], "a") == [
        "a/additional_chat_templates/tools.jinja", "a/chat_template.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        ("config.json value_head.safetensors pytorch_model.bin", ""),
        ("config.json value_head.safetensors pytorch_model.bin model.safetensors", "pytorch_model.bin"),
        ("adapter_config.json adapter_model.bin value_head.safetensors", ""),
        ("adapter_config.json adapter_model.bin adapter_model.safetensors", "adapter_model.bin"),
        ("adapter_model.bin model.safetensors pytorch_model.bin", "pytorch_model.bin"),
        ("adapter_model.safetensors pytorch_model.bin value_head.bin", ""),
        ("model.safetensors value_head.bin", ""),
        ("model.fp16.safetensors model.safetensors", "model.fp16.safetensors"),
        ("model-00001-of-00002.safetensors model-00001-of-00002.fp16.safetensors", "model-00001-of-00002.fp16.safetensors"),
        ("model.fp16-00001-of-00002.safetensors model-00001-of-00001.safetensors", "model.fp16-00001-of-00002.safetensors"),
        ("model.safetensors model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json"),
        ("pytorch_model.bin pytorch_model.fp16.bin", "pytorch_model.fp16.bin"),
        ("model.fp16.safetensors pytorch_model.bin", ""),
        ("model.00-of-01.safetensors model.safetensors.index.json", ""),
        ("pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json", ""),
        ("model-00001-of-00001.safetensors pytorch_model.bin.index.json", "pytorch_model.bin.index.json"),
    ],
)
def test_weights_are_left_out_only_beside_the_same_weights_in_another_format(names: str, left_out: str) -> None:
    assert needed_files(names.split()) == sorted(set(names.split()) - set(left_out.split()))


# --- sidecars and digests ---


def test_folders_upwards_end_at_the_root_of_the_repository(nla_hub: Hub) -> None:
    path = hub.resolve("owner/nla/iter_000400/av")
    root = path.parent.parent
    assert hub.folders_upwards(path) == [path, root / "iter_000400", root]
    assert hub.folders_upwards(root) == [root]


def test_folders_upwards_of_a_local_path_are_two_above_it_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = tmp_path / "home" / "run" / "iter_000100" / "critic"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.folders_upwards(critic) == [critic, critic.parent, critic.parent.parent]
    assert hub.folders_upwards(critic.parent.parent) == [critic.parent.parent, tmp_path]
    assert hub.repository_root(critic) is None and hub.hub_spelling(critic) is None


def test_the_digest_of_a_folder_does_not_depend_on_what_else_was_downloaded(nla_hub: Hub, tmp_path: Path) -> None:
    files = nla_hub.repositories["owner/nla"].revisions["main"]
    files |= {"adapter_model.safetensors": b"rl", "adapter_config.json": b"{}"}  # a checkpoint above others
    with hub.noted_revisions() as revisions:
        digest = hub.content_digest(hub.resolve("owner/nla"))
    hub.resolve("owner/nla/iter_000400/av")
    assert hub.content_digest(hub.resolve("owner/nla")) == digest
    assert revisions == {f"owner/nla@{HubRepository.commit(files)}"}
    for name in ("adapter_model.safetensors", "adapter_config.json", "nla_meta.yaml"):
        (tmp_path / name).write_bytes(files[name])
    assert hub.content_digest(hub.resolve("owner/nla")) == digest


# --- refusals ---


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("owner/nla/iter_000400/av@v1", "'owner/nla@v1/iter_000400/av'"),
        ("https://huggingface.co/owner/nla/tree/main/iter_000400/av", "'owner/nla@main/iter_000400/av'"),
        ("hf://owner/nla", "'owner/nla'"),
    ],
)
def test_another_spelling_is_refused_with_the_right_one(source: str, right: str) -> None:
    assert f"write {right}" in refusal(source)


@pytest.mark.parametrize("source", ["owner/nla/../x", "owner", "owner/nla@", "owner/nla@v1//av", "./owner/nla/av"])
def test_what_is_neither_a_path_nor_of_the_hub_is_not_asked_for(nla_hub: Hub, source: str) -> None:
    assert "expected an existing path, or a hub id such as owner/name" in refusal(source) and not nla_hub.requests


def test_a_mistyped_path_below_a_directory_that_is_here_is_not_asked_for(nla_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert "expected an existing path" in refusal("runs/iter_0000500/av") and not nla_hub.requests


def test_a_folder_without_a_checkpoint_is_told_where_some_are(nla_hub: Hub) -> None:
    said = refusal("owner/nla/iter_000400")
    assert "its folders do: iter_000400/ar, iter_000400/av" in said and "Name one of them: 'owner/nla/iter_000400/ar'" in said
    assert "Folders with weights: iter_000200/av, iter_000400/ar, iter_000400/av" in refusal("owner/nla/iter_000600/av")


def test_a_revision_that_is_not_there_is_said(nla_hub: Hub) -> None:
    assert "repository owner/nla of the model hub has no revision 'v2'" in refusal("owner/nla@v2")
    assert "has no revision 'v2' or 'v2/av'" in refusal("owner/nla@v2/av")
    del nla_hub.repositories["owner/nla"].revisions["main"]
    assert "has no revision 'main'" in refusal("owner/nla/iter_000400/av")


def test_a_repository_that_is_not_there_or_private_is_said(nla_hub: Hub) -> None:
    said = refusal("owner/nothing@v1/av")
    assert "there is no repository owner/nothing, or it is private" in said and "hf auth login" in said


def test_a_token_that_the_hub_does_not_know_is_said(nla_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    nla_hub.refused_token = "hf_expired"
    assert "the hub refuses the token (HTTP 401). Log in again" in refusal("owner/nla")


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_a_gated_repository_says_where_its_conditions_are(
    nla_hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    nla_hub.repositories["owner/nla"].is_gated = True
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refusal("owner/nla/iter_000400/av")
    assert "owner/nla is gated" in said and f"{nla_hub.endpoint}/owner/nla, log in with that account (hf auth login" in said
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert hub.resolve("owner/nla/iter_000400/av").name == "av"


@pytest.fixture
def large_file(nla_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bytes]:
    """Weights of 102,400 bytes, whose transfer breaks at byte 70,000 as often as a test says."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # bytes that are written at once
    name, weights = f"{AV}/adapter_model.safetensors", bytes(range(256)) * 400
    nla_hub.repositories["owner/nla"].revisions["main"][name] = weights
    nla_hub.breaks_at = 70_000
    return name, weights


def test_a_connection_that_breaks_is_taken_up_where_it_broke(nla_hub: Hub, large_file: tuple[str, bytes]) -> None:
    name, weights = large_file
    nla_hub.num_breaks = 1
    path = hub.resolve(f"owner/nla/{AV}")
    assert (path / "adapter_model.safetensors").read_bytes() == weights
    assert [sent[1:] for sent in nla_hub.sent if sent[0] == name] == [(0, 70_000), (70_000, 32_400)]


def test_after_an_interrupted_download_only_files_that_are_missing_are_asked_for(
    nla_hub: Hub, large_file: tuple[str, bytes]
) -> None:
    name, weights = large_file
    nla_hub.num_breaks = 1000
    said = refusal(f"owner/nla/{AV}")
    assert "the download was interrupted" in said and "Run the same command again: files that have arrived are kept" in said
    nla_hub.forget()
    path = hub.resolve(f"owner/nla/{AV}")
    assert nla_hub.asked_files() == {name} and (path / "adapter_model.safetensors").read_bytes() == weights


# --- without a network ---


def test_offline_the_cache_is_used_and_what_it_lacks_is_said(nla_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.resolve("owner/nla/iter_000400/av")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nla_hub.forget()
    assert hub.resolve("owner/nla/iter_000400/av") == path and not nla_hub.requests
    said = refusal("owner/nla/iter_000200/av")
    assert "only partly in the hub's cache" in said and "2 of 3 files are missing" in said
    (path / "tokenizer.json").unlink()
    assert "1 of 4 files are missing (iter_000400/av/tokenizer.json)" in refusal("owner/nla/iter_000400/av")
    said = refusal("owner/other@v1/iter_000400/av")
    assert "HF_HUB_OFFLINE is set" in said and "hf download owner/other --revision v1 --include 'iter_000400/av/*'" in said


def test_a_hub_that_does_not_answer_leaves_what_the_cache_has(
    nla_hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = hub.resolve("owner/nla@v1/iter_000400/av")
    use_hub(monkeypatch, "http://127.0.0.1:1", str(Path("cache").resolve()))
    assert hub.resolve("owner/nla@v1/iter_000400/av") == path and "the model hub does not answer" in caplog.text
    assert "Check the network and HF_ENDPOINT (http://127.0.0.1:1)" in refusal("owner/other")


def test_the_endpoint_and_the_cache_come_from_the_environment(nla_hub: Hub, tmp_path: Path) -> None:
    code = "from ksweep.utils import hub; print(hub.resolve('owner/nla@v1/iter_000400/av'))"
    places = {"HF_ENDPOINT": nla_hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "own")}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **places}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "own")) and nla_hub.asked_files() == NEEDED


def test_readings_of_a_source_begin_with_the_shortest_revision() -> None:
    assert [(r.revision, r.folder) for r in hub_readings("o/n@a/b/c")] == [("a", "b/c"), ("a/b", "c"), ("a/b/c", "")]
    assert [(r.revision, r.folder) for r in hub_readings("o/n@refs/pr/1/c")] == [("refs/pr/1", "c"), ("refs/pr/1/c", "")]
    assert [(r.revision, r.folder) for r in hub_readings("o/n/a/b")] == [(None, "a/b")]
