"""Checkpoints from the Hugging Face Hub. Only files of data are fetched, none that could run."""

from pathlib import Path

from huggingface_hub import errors, snapshot_download


def fetch(name: str) -> Path:
    """The folder of owner/name, fetched or from the cache. ValueError says what to do."""
    data = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=data, ignore_patterns="*/*"))
    except errors.GatedRepoError:
        todo = f"is gated: ask for access at https://huggingface.co/{name}, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        todo = "is no folder here and no model on the Hub: check the name, or run `hf auth login`"
    except errors.HFValidationError:
        todo = "is no folder here, nor a name the Hub could have: owner/name"
    except errors.LocalEntryNotFoundError:
        todo = "is no folder here and not in the Hub's cache: go online, without HF_HUB_OFFLINE"
    except Exception as error:  # any other trouble with a network
        reason = " ".join(str(error).split())
        todo = f"could not be fetched from the Hub: {type(error).__name__}: {reason}"
    raise ValueError(f"{name} {todo}") from None
