"""
What vLLM 0.30 cannot import with pictures, on a CPU and beside transformers 5.23. To be imported before anything that
imports torchvision.

PyPI's torchvision is built for CUDA: beside torch for CPUs its operators are missing, and its import fails. And vLLM's
LLaVA imports parts of Pixtral, of which it makes no use with CLIP, and which transformers has renamed.
"""

from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    from transformers.models.pixtral import modeling_pixtral

    for name in ("PixtralRotaryEmbedding", "apply_rotary_pos_emb", "position_ids_in_meshgrid"):
        vars(modeling_pixtral).setdefault(name, None)
