"""What a process has used so far, and the size of a model as its cost is counted by."""

import resource
import sys
from typing import Any

# Of ``ru_maxrss``: kilobytes on Linux, bytes on macOS.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory() -> dict[str, float]:
    """``peak_memory_mb`` of this process and, with a GPU in use, ``gpu_peak_memory_mb`` as torch allocated it."""
    found = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20, 1)}
    torch = sys.modules.get("torch")  # a stage that never imported torch used no GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def parameter_size(parameter: Any) -> int:
    """How many numbers a parameter stands for: of a shard those of all ranks, of packed 4-bit weights two a byte."""
    if type(parameter).__name__ == "Params4bit" and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parameters_without_embeddings(model: Any) -> int:
    """N of the rule "2 N FLOPs a token forward, 6 N with backward"; of a sharded model all parameters count."""
    from torch.nn import Embedding

    embeddings = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Embedding)}
    return sum(parameter_size(parameter) for name, parameter in model.named_parameters() if name not in embeddings)
