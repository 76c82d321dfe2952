"""Worker (see worker.py): llama.cpp by llama-cpp-python's low-level interface, one llama_batch of several sequences a repetition.

Only `llama_decode` and the wait for its logits are timed, no sampling. With `requantize: [out, type]` in the job the model is
only written again as Q8_0 or Q4_0, and nothing is timed. The cache is not unified and flash attention is on; `unified` and `flash`
in the job change that. In a unified cache attention goes over the cells of all sequences, which was slower with a chunk in a batch.
Sequences that a batch does not use are not in the cache.
"""

import ctypes
import time
from importlib.metadata import version

import llama_cpp as ll
import numpy as np
from worker import job, say, tokens


def requantize(model: str, out: str, name: str) -> None:
    options = ll.llama_model_quantize_default_params()
    options.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
    options.allow_requantize = True
    if ll.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not write {model} as {name}")


class Context:
    """A model with room for `sequences` of up to `longest` tokens."""

    def __init__(self, path: str, threads: int, sequences: int, longest: int, unified: bool, flash: bool):
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        options = ll.llama_context_default_params()
        options.n_ctx = -(-longest // 256) * 256 * sequences
        options.n_batch = options.n_ubatch = 1024
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = unified
        options.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = ll.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = ll.llama_get_memory(self.context)
        self.batch = ll.llama_batch_init(1024, 0, 1)

    def run(self, pieces: list[tuple[int, int, list[int]]]) -> float:
        """Seconds for one batch of (sequence, start, token ids); logits for the last token of each."""
        batch, at = self.batch, 0
        for sequence, start, ids in pieces:
            for i, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, start + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == len(ids) - 1
                at += 1
        batch.n_tokens = at
        began = time.perf_counter()
        if code := ll.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode answered {code}")
        ll.llama_get_logits(self.context)
        return time.perf_counter() - began

    def cut(self, sequence: int, start: int) -> None:
        """Removes the sequence's cache from position `start` on."""
        ll.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def copy(self, source: int, target: int) -> None:
        """Copies the cache of `source` into own cells of `target`."""
        size = ll.llama_state_seq_get_size(self.context, source)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        ll.llama_state_seq_get_data(self.context, pointer, size, source)
        if not ll.llama_state_seq_set_data(self.context, pointer, size, target):
            raise RuntimeError("llama.cpp could not copy a sequence")


def main() -> None:
    task = job()
    say(version=f"llama-cpp-python {version('llama_cpp_python')}")
    ll.llama_backend_init()
    if "requantize" in task:
        requantize(task["model"], *task["requantize"])
        return
    longest = max(max(b["context"] + 1, b["chunk"]) for b in task["batches"])
    most = max(b["decodes"] for b in task["batches"])
    unified, flash = task.get("unified", False), task.get("flash", True)
    context = Context(task["model"], task["threads"], most + 1, longest, unified, flash)
    # From few sequences to many, so that the cache always holds only those of the batch.
    held = 0
    for batch in sorted(task["batches"], key=lambda b: (b["decodes"], b["context"])):
        start, seconds = batch["context"], []
        if held:
            context.cut(0, 0)
            for sequence in range(1, held):
                context.cut(sequence, 0)
        held = batch["decodes"]
        if held:
            context.run([(0, 0, tokens(start))])
            for sequence in range(1, held):
                context.copy(0, sequence)
        for _ in range(1 + task["repeats"]):
            pieces = [(sequence, start, tokens(1)) for sequence in range(held)]
            if batch["chunk"]:
                pieces.append((most, 0, tokens(batch["chunk"])))
            seconds.append(context.run(pieces))
            for sequence, position, _ in pieces:
                context.cut(sequence, position)
        say(batch=batch["name"], seconds=seconds[1:])


main()
