"""Worker (see worker.py): llama.cpp by llama-cpp-python, one stream, greedy, without and with its prompt lookup (as
`LlamaPromptLookupDecoding` has it). A job has `prompts` by kind; the answer has tokens per second after the first token.
"""

import statistics
import time
from importlib.metadata import version

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from worker import job, say


def tokens_per_s(llama: Llama, prompt: list[int], number: int) -> float:
    began, count = 0.0, 0
    llama.reset()
    for count, _ in enumerate(llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), 1):
        if count == 1:
            began = time.perf_counter()
        if count == number:
            break
    return (count - 1) / (time.perf_counter() - began)


def main() -> None:
    task = job()
    say(version=f"llama-cpp-python {version('llama_cpp_python')}")
    guesses = LlamaPromptLookupDecoding(num_pred_tokens=task["guesses"])
    sides = [
        Llama(task["model"], n_ctx=4096, logits_all=lookup is not None, draft_model=lookup, verbose=False)
        for lookup in (None, guesses)
    ]
    for kind, prompt in task["prompts"].items():
        taken: list[list[float]] = [[], []]
        for again in range(task["rounds"] + 1):
            for times, llama in zip(taken, sides, strict=True):
                rate = tokens_per_s(llama, prompt, task["tokens"])
                if again:
                    times.append(rate)
        say(kind=kind, plain=statistics.median(taken[0]), lookup=statistics.median(taken[1]))


main()
