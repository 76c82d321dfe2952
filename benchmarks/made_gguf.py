"""A GGUF file of a model of a known shape with random weights: for measuring sizes and times, not answers.

The tokenizer is that of the embedded model, with tokens added that no text has. Weights are random blocks of a quantisation.

    python benchmarks/made_gguf.py 1.1b q4_k /tmp/1.1b-q4_k.gguf
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.fetch import locate

SHAPES = {  # vocabulary, layers, hidden, heads, KV heads, FFN
    "1.1b": (49152, 22, 2048, 32, 4, 5632),  # TinyLlama
    "8b": (128256, 32, 4096, 32, 8, 14336),  # Llama 3
}
KINDS = ("q4_0", "q4_1", "q4_k", "q8_0")
HALVES = {"q4_0": 1, "q4_1": 2, "q4_k": 2, "q8_0": 1}
"""The 16-bit floats at the beginning of a block."""
STEP = {"q4_0": 4e-3, "q4_1": 4e-3, "q4_k": 1e-4, "q8_0": 2e-4}
"""The size of these floats, so that weights are about 0.02, as in models."""
LEAST = {"q4_1": -8, "q4_k": 8}
"""The second of these floats over the first, so that weights are about 0 on average."""


def blocks(draw: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes of a row] uint8."""
    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    raw = np.frombuffer(draw.bytes(rows * columns // size * num_bytes), np.uint8).reshape(rows, -1, num_bytes).copy()
    scales = np.full((rows, columns // size, HALVES[kind]), STEP[kind], "<f2")
    scales[..., 1:] *= LEAST.get(kind, 1)
    raw[..., : 2 * HALVES[kind]] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def make(shape: str, kind: str, file: Path) -> None:
    vocab, layers, hidden, heads, kv_heads, ffn = SHAPES[shape]
    draw, head = np.random.default_rng(0), hidden // heads
    metadata = dict(open_checkpoint(locate()).metadata or {})
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            _add(writer, key, value, vocab)
    sizes = {"attn_q": (hidden, hidden), "attn_k": (kv_heads * head, hidden), "attn_v": (kv_heads * head, hidden)}
    sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
    matrices = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    matrices |= {f"blk.{layer}.{name}": size for layer in range(layers) for name, size in sizes.items()}
    for name, (rows, columns) in matrices.items():
        writer.add_tensor(f"{name}.weight", blocks(draw, kind, rows, columns), raw_dtype=GGMLQuantizationType[kind.upper()])
    for name in ["output_norm", *(f"blk.{layer}.{norm}" for layer in range(layers) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any, vocab: int) -> None:
    if key == "tokenizer.ggml.tokens":
        writer.add_token_list([*value, *(f"<unused{n}>" for n in range(len(value), vocab))][:vocab])
    elif key == "tokenizer.ggml.token_type":
        writer.add_token_types([*value, *[5] * (vocab - len(value))][:vocab])
    elif key == "tokenizer.ggml.merges":
        writer.add_token_merges(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("kind", choices=KINDS)
    arguments.add_argument("file", type=Path)
    args = arguments.parse_args()
    make(args.shape, args.kind, args.file)


if __name__ == "__main__":
    main()
