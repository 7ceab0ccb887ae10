"""Runs inside vLLM's worker: writes down every request that reaches the model, and dies or hangs of marked ones.

A custom logits processor is vLLM's own way to run code where the model runs. Named in ``engine_kwargs`` of an engine
whose environment has WITNESS, the path of a file that gets one byte per request.
"""

import os
import signal
import threading
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from tests.chaos.marks import WITNESS

# Of marks.DEADLY and marks.STOPPING.
_DEADLY_ID, _STOPPING_ID = 1, 2


class Witness(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._file = os.open(os.environ[WITNESS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: Any) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            os.write(self._file, b".")
            if _DEADLY_ID in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if _STOPPING_ID in prompt:
                threading.Event().wait()
