"""What the other rooms ask of an autoencoder without knowing its family."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksweep import Autoencoder
from ksweep.autoencoder.family import family_of


@pytest.mark.parametrize(
    ("av", "name"),
    [
        ("owner/nla-qwen2.5-7b-L20-av", "qwen2.5-7b-L20"),
        ("owner/nla-qwen2.5-7b-L20-av@main", "qwen2.5-7b-L20"),
        ("owner/gemma_AV", "gemma"),
        ("owner/nla/iter_000400/av", "iter_000400"),
        ("owner/nla@v1/iter_000400/av", "iter_000400"),
        ("owner/nla@refs/pr/1/p0.01", "p0.01"),
        ("/models/demo/av", "demo"),
        ("/models/demo/nla-av/", "demo"),
        ("/models/demo/actor", "demo"),
        ("/models/plain", "plain"),
    ],
)
def test_short_name_is_what_tells_pairs_apart(av: str, name: str) -> None:
    assert family_of(Autoencoder(av=av, ar="x")).short_name == name


def test_short_name_of_a_relative_directory_is_the_one_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "av").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert family_of(Autoencoder(av="av", ar="ar")).short_name == "mine"
