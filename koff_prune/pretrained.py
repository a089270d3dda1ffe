"""transformers' `from_pretrained` without remote code, its failures told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoTokenizer

from koff_export.errors import KoffError


def load(auto: Any, source: str, name: str, **options: Any) -> Any:
    """`auto.from_pretrained` of the model that the recipe calls `name`.

    Raises:
        KoffError: It cannot be loaded.
    """
    with told(name, {AutoConfig: "configuration", AutoTokenizer: "tokenizer"}.get(auto, "weights")):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


@contextmanager
def told(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside, as one sentence on `what` of the model `name`.

    Raises:
        KoffError: Of it, or as it was raised inside.
    """
    try:
        yield
    except (KoffError, MemoryError):
        raise
    except GatedRepoError as error:
        raise KoffError(
            f"model.source '{name}': is given out to those alone who have accepted its licence; do so on its"
            " page on the hub, then `hf auth login`"
        ) from error
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads them to
        raise KoffError(
            f"model.source '{name}': the {what} cannot be loaded ({short(error)}); "
            "check the name and revision, the network, or that the folder is whole"
        ) from error


def short(error: Exception) -> str:
    """An error's text on one line, of 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__
