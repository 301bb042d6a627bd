"""mistral4: Mistral-Small-4. deepseek2's tensors and layers; far out, queries grow.

The growth is Llama 4's attention temperature, and comes with the metadata keys that describe it
(Hparams.temperature). Mistral-Large-3 files have these keys too, and call themselves deepseek2.
"""

from mlacli.models.deepseek2 import MODEL, Hparams, forward, layer_tensors

__all__ = ["MODEL", "Hparams", "forward", "layer_tensors"]
