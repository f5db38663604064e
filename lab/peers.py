"""transformers' own decoding with the same weights, to be measured next to ours."""

import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch

from arguments import Generation
from checkpoints import save
from model import Llama


def peers(model: Llama, exit: int) -> list[tuple[str, Callable[..., Generation]]]:
    """Return transformers' greedy, early-exit and prompt-lookup decoding, without our exit heads.

    It gets the weights through a temporary folder in Hugging Face's format.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(model, None, folder)
        dtype = model.embed.weight.dtype
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.to(model.embed.weight.device)

    def decode(
        prompt, max_new_tokens, *, stop, temperature=0.0, top_p=1.0, top_k=0, seed=0, **options
    ) -> Generation:
        torch.manual_seed(seed)
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        began = time.perf_counter()
        ids = torch.tensor([prompt], device=theirs.device)
        options |= {"eos_token_id": list(stop), "pad_token_id": 0}
        options |= {"attention_mask": torch.ones_like(ids)}
        options |= {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        out = theirs.generate(ids, **options)
        return Generation(out[0, len(prompt) :].tolist(), [], time.perf_counter() - began, 0.0)

    kinds = {
        "transformers": {},
        "transformers early exit": {"assistant_early_exit": exit},
        "transformers lookup": {"prompt_lookup_num_tokens": 10},
    }
    return [(name, partial(decode, **options)) for name, options in kinds.items()]
