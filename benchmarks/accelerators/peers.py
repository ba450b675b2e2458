"""torch's losses on the same GPU, where torch (and Liger) are installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = ("torch, all logits", "torch, Liger")


def loss(name: str, arrays: Callable[[], list]) -> dict[str, Any]:
    """Time of forward KL with gradients in torch; one of NAMES.

    Args:
        arrays: gives hidden states and head of student and teacher.
    """
    needed = ["torch", "liger_kernel"] if name == "torch, Liger" else ["torch"]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        return {"skipped": f"{missing[0]} is not installed"}
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "torch has no GPU here"}
    tensors = [
        torch.tensor(np.asarray(array, np.float32), dtype=torch.bfloat16, device="cuda") for array in arrays()
    ]  # fmt: skip
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    function = _liger(len(tensors[0])) if name == "torch, Liger" else _dense
    torch.cuda.reset_peak_memory_stats()
    before, took = torch.cuda.memory_allocated(), []
    for _ in range(5):
        tensors[0].grad = tensors[1].grad = None
        torch.cuda.synchronize()
        began = time.perf_counter()
        value = function(*tensors)
        value.backward()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    # the first compiles
    return {"value": 1e3 * min(took[1:]), "unit": "ms", "temporary_gib": extra, "loss": float(value)}


def _dense(hidden, head, teacher_hidden, teacher_head):
    from torch.nn import functional as F

    log_q = F.log_softmax((hidden @ head.T).float(), -1)
    log_p = F.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _liger(tokens: int):
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = torch.zeros(tokens, dtype=torch.long, device="cuda")
    return lambda hidden, head, teacher, teacher_head: module(hidden, head, teacher, teacher_head, labels)
