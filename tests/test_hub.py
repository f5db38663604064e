"""Checkpoints by owner/name: from the Hub's cache, or one line that says what to do."""

from functools import partial
from unittest.mock import Mock

import pytest
from conftest import random_model

import checkpoints
from checkpoints import save

load = partial(checkpoints.load, device="cpu")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline cache with one model, laid out as huggingface_hub does."""
    import huggingface_hub

    cache = tmp_path / "hub"
    root = cache / "models--owner--name"
    commit = "0" * 40
    save(random_model(tie_embeddings=True), None, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_model_of_the_hubs_cache(hub):
    assert load("owner/name")[0].config.n_layers == 5


def test_what_the_hub_lacks_ends_in_one_line(hub, monkeypatch):
    from huggingface_hub import errors

    with pytest.raises(
        ValueError, match="owner/other is no folder here and not in the Hub's cache: go online"
    ) as error:
        load("owner/other")
    assert "\n" not in str(error.value)
    response = Mock(headers={})
    for raised, message in {
        errors.GatedRepoError(
            "no", response=response
        ): "owner/x is gated: ask for access at https://huggingface.co/owner/x",
        errors.RepositoryNotFoundError(
            "no", response=response
        ): "owner/x is no folder here and no model on the Hub: check",
        TimeoutError(
            "two\nlines"
        ): "owner/x could not be fetched from the Hub: TimeoutError: two lines",
    }.items():

        def fail(*args, error=raised, **options):
            assert not any(
                "bin" in pattern or "pt" in pattern or "py" in pattern
                for pattern in options["allow_patterns"]
            )
            raise error

        monkeypatch.setattr(checkpoints.hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match=message):
            load("owner/x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nor a name the Hub could have"):
        load("owner/a..b")
