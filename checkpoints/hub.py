"""Checkpoints by name from the Hugging Face Hub: json, safetensors, tokenizer.model and jinja files
only.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]  # nothing that could run


def fetch(name: str) -> Path:
    """The folder of owner/name, fetched, or as the cache has it. ValueError, saying what to do, if
    it cannot be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns="*/*"))
    except GatedRepoError:
        todo = (
            f"is gated: ask for access at https://huggingface.co/{name}, then run `hf auth login`"
        )
    except RepositoryNotFoundError:
        todo = "is no folder here and no model on the Hub: check the name, or run `hf auth login`"
    except HFValidationError:
        todo = "is no folder here, nor a name the Hub could have: owner/name"
    except LocalEntryNotFoundError:
        todo = "is no folder here and not in the Hub's cache: go online, without HF_HUB_OFFLINE"
    except Exception as error:  # whatever else a network does
        reason = " ".join(str(error).split())
        todo = f"could not be fetched from the Hub: {type(error).__name__}: {reason}"
    raise ValueError(f"{name} {todo}") from None
