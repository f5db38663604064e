"""Checkpoints by owner/name: they come from the Hub's cache, or one line says what to do."""

from functools import partial
from unittest.mock import Mock

import pytest
from conftest import random_model
from huggingface_hub import constants, errors

import checkpoints
from checkpoints import save

load = partial(checkpoints.load, device="cpu")
RESPONSE = Mock(headers={})
REFUSED = {
    "is gated: ask for access at https://huggingface.co/owner/x": errors.GatedRepoError(
        "no", response=RESPONSE
    ),
    "is no folder here and no model on the Hub": errors.RepositoryNotFoundError(
        "no", response=RESPONSE
    ),
    "could not be fetched from the Hub: TimeoutError: two lines": TimeoutError("two\nlines"),
}


def test_offline_only_the_hubs_cache_is_read(tmp_path, monkeypatch):
    root, commit = tmp_path / "models--owner--name", "0" * 40
    save(random_model(), None, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("owner/name")[0].config.n_layers == 5
    with pytest.raises(ValueError, match="owner/other .* not in the Hub's cache: go online"):
        load("owner/other")
    with pytest.raises(ValueError, match="nor a name the Hub could have"):
        load("owner/a..b")


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_hub_refuses_ends_in_one_line(monkeypatch, message):
    """Also, no file that could run is asked for."""

    def fail(*args, allow_patterns, **options):
        assert not any(kind in p for p in allow_patterns for kind in ("bin", "pt", "py"))
        raise REFUSED[message]

    monkeypatch.setattr(checkpoints.hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=f"^owner/x {message}") as error:
        load("owner/x")
    assert "\n" not in str(error.value)
