"""GGUF files. The header is parsed here, and every size in it is checked against the file before use. The `gguf` package
dequantises tensors. The layout is in ggml/docs/gguf.md, versions 2 and 3, little-endian.

It knows each architecture's names of tensors, and what llama.cpp's converter has changed: in llama files the two halves of each
rotary pair of queries and keys are side by side, where Hugging Face has them half a head apart; Gemma's norms are larger by 1
already; a layer's experts are in one tensor. It does not know tokenizers.
"""

import re
import struct
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import (
    ModelConfig,
    check,
    check_tensors,
    padded,
    rotary_frequencies,
    rotary_limit,
    rotary_scale,
)
from stallfree.checkpoint.dimensions import CheckpointError, Dimensions, positive, size
from stallfree.checkpoint.families import FAMILIES, Experts
from stallfree.checkpoint.folding import folded, folded_blocks, fused_rows, gemma, granite
from stallfree.checkpoint.ggml import KINDS, from_ggml

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
"""llama.cpp's names for the files of a model in several files."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_sinks": "self_attn.sinks",
}
OWN_NAMES = {
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
    "gpt-oss": {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "olmo2": {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
"""Names that are only in an architecture, or mean something else there."""

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
"""Names of tensors that hold a matrix, or a bias, of all experts of a layer."""

UNROTATED = 4
"""SmolLM3's layers from one without positions to the next, which files do not say."""


class Tensor:
    """One tensor of the file: shape ([out, in]), quantisation and where its bytes are."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        try:
            self.kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[self.kind]
        except (ValueError, KeyError):
            known = ", ".join(form.name for form in GGML_QUANT_SIZES)
            what = f"tensor {name!r} has the unknown quantisation {kind}; known are {known}"
            raise CheckpointError(f"{path}: {what}; take another file, or update `gguf`") from None
        self.path, self.name, self.shape, self.offset = path, name, shape, offset
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} does not fit {self.kind.name} blocks of {block}")
        self.row_bytes = shape[-1] // block * block_bytes
        self.num_bytes = self.row_bytes
        for rows in shape[:-1]:
            self.num_bytes *= rows

    def raw(self) -> np.ndarray:
        """The bytes of the rows, [*shape without the last, bytes] uint8."""
        raw = np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.offset)
        if raw.size != self.num_bytes:
            raise CheckpointError(f"{self.path}: tensor {self.name!r} ends early; the file changed after it was opened")
        return raw.reshape(*self.shape[:-1], self.row_bytes)

    def read(self) -> np.ndarray:
        """The values, [*shape] float32."""
        try:
            values: np.ndarray = dequantize(self.raw(), self.kind)
        except NotImplementedError:
            unknown = f"tensor {self.name!r} is {self.kind.name}, which cannot be dequantised"
            raise CheckpointError(f"{self.path}: {unknown}; take another quantisation") from None
        return values.astype(np.float32, copy=False)


class Header:
    """A cursor over the file's bytes that never reads past their end."""

    def __init__(self, path: Path, data: np.memmap) -> None:
        self.path, self.data, self.at = path, data.data, 0

    def truncated(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: the file ends early, at {len(self.data)} bytes; it is truncated, fetch it again")

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self.data) - self.at:
            raise self.truncated()
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self, kind: int) -> object:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: value of type {kind} at byte {self.at}; the file is damaged, fetch it again")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            form = SCALARS[kind][1]
            return np.frombuffer(self.take(count * struct.calcsize("<" + form)), "<" + form).tolist()
        if kind != STRING:
            raise CheckpointError(f"{self.path}: array of type {kind} at byte {self.at}; the file is damaged, fetch it again")
        return [self.string() for _ in range(count)]


def read_gguf(path: Path) -> Checkpoint:
    """Read the header of a GGUF file. Of a model in several files, any one may be named; all headers are read. Raises
    CheckpointError if a file is missing, truncated or damaged, or if it holds another kind of model."""
    metadata, stored = _open(path)
    files, count = [path], size({"split.count": metadata.get("split.count") or 1}, "split.count", str(path))
    if count > 1:
        files, stored = parts(path), {}
        if len(files) != count:
            usual = f"-00001-of-{count:05}.gguf and so on"
            raise CheckpointError(f"{path}: is one of {count} files, whose names end in {usual}; name them so")
        for number, file in enumerate(files):
            values, tensors = _open(file)
            metadata = metadata if number else values
            part, parts_in_all = values.get("split.no"), values.get("split.count")
            if (part, parts_in_all) != (number, count):
                raise CheckpointError(f"{file}: it is part {part} (from 0) of {parts_in_all}; give it its original name")
            stored |= tensors
        if len(stored) != (wanted := size(metadata, "split.tensors.count", str(files[0]), len(stored))):
            raise CheckpointError(f"{files[0]}: its {count} files hold {len(stored)} tensors of {wanted}; fetch them again")
    config, tensors = _config(metadata, stored, files[0])
    check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, str(files[0]))
    return Checkpoint(
        files[0],
        config,
        partial(folded, config, partial(_read, config, tensors)),
        metadata,
        tuple(files),
        {name: KINDS[tensor.kind] for name, tensor in tensors.items() if tensor.kind in KINDS and len(tensor.shape) == 2},
        partial(folded_blocks, config, partial(_blocks, config, tensors)),
    )


def parts(path: Path) -> list[Path]:
    """The files of the model that `path` is a part of, by llama.cpp's names: -00001-of-00003.gguf and so on."""
    name = PART.fullmatch(path.name)
    if name is None:
        return [path]
    return [path.with_name(f"{name[1]}-{number:05}-of-{name[2]}.gguf") for number in range(1, int(name[2]) + 1)]


def _open(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A file's metadata and tensors, by GGUF's names."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; a model in several files needs all of them beside each other")
    with path.open("rb") as file:
        magic = file.read(24)
    if len(magic) < 24 or magic[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file; give a .gguf file or a Hugging Face folder")
    header = Header(path, np.memmap(path, np.uint8, "r"))
    header.take(4)
    version, num_tensors, num_values = header.number("<I"), header.number("<Q"), header.number("<Q")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 (little-endian) are")
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = header.string()
        metadata[key] = header.value(header.number("<I"))
    return metadata, _tensors(header, num_tensors, size(metadata, "general.alignment", str(path), 32))


def _tensors(header: Header, count: int, alignment: int) -> dict[str, Tensor]:
    entries = []
    for _ in range(count):
        name, dims = header.string(), header.number("<I")
        if dims > 4:
            raise CheckpointError(f"{header.path}: tensor {name!r} has {dims} dimensions; the file is damaged, fetch it again")
        shape = tuple(reversed([header.number("<Q") for _ in range(dims)]))
        entries.append((name, shape, header.number("<I"), header.number("<Q")))
    start = -(-header.at // alignment) * alignment
    tensors = {name: Tensor(header.path, name, shape, kind, start + offset) for name, shape, kind, offset in entries}
    if any(t.offset + t.num_bytes > len(header.data) for t in tensors.values()):
        raise header.truncated()
    return tensors


def _config(metadata: dict[str, object], stored: dict[str, Tensor], path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    source, kind = str(path), str(metadata.get("general.architecture"))
    mixed = bool(metadata.get(f"{kind}.expert_count"))
    # Mistral's files, and Mixtral's, say llama.
    read = {row.gguf: name for name, row in FAMILIES.items() if row.gguf and mixed == (row.experts is not None)}
    if kind not in read:
        what = " with experts" if mixed else ""
        raise CheckpointError(
            f"{path}: architecture {kind!r}{what} is not supported; supported in GGUF{what} are {', '.join(read)}"
        )
    family = read[kind]
    mixture = FAMILIES[family].experts

    def whole(key: str, default: int | None = None) -> int:
        return size(metadata, f"{kind}.{key}", source, default)

    num_layers, hidden, num_heads = whole("block_count"), whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("attention.key_length", hidden // num_heads)
    rotated = whole("rope.dimension_count", head_dim)
    if rotated != head_dim and (not FAMILIES[family].partial or rotated > head_dim or rotated % 2):
        raise CheckpointError(f"{path}: rotary positions on {rotated} of {head_dim} dimensions of a head are not supported")
    if (values := whole("attention.value_length", head_dim)) != head_dim:
        raise CheckpointError(f"{path}: value heads of {values} beside key heads of {head_dim} are not supported")
    if mixture:
        stored = _single(mixture, whole("expert_count"), stored, source)
    tensors = {_name(name, kind): tensor for name, tensor in stored.items()}
    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{path}: tensors are missing: 'token_embd.weight'; the file is incomplete")
    longest = whole("context_length")
    scaling = _scaling(metadata, f"{kind}.rope.", longest, source)
    if family == "gpt_oss":
        scaling["truncate"] = False  # files do not say it
    theta = positive(metadata, f"{kind}.rope.freq_base", source, 10000.0)
    inv_freq = rotary_frequencies(rotated, theta, scaling, source, longest)
    if "rope_freqs.weight" in stored:
        # Llama 3's scaling is stored as one divisor per rotary pair.
        divisors = stored["rope_freqs.weight"].read().ravel()
        if divisors.size != len(inv_freq) or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise CheckpointError(f"{path}: 'rope_freqs.weight' does not hold {len(inv_freq)} numbers above 0")
        inv_freq = tuple(f / float(d) for f, d in zip(inv_freq, divisors, strict=True))
    window = metadata.get(f"{kind}.attention.sliding_window")
    windows = (window if isinstance(window, int) and window > 0 else 0,) * num_layers
    if FAMILIES[family].window == "pattern":
        windows = tuple(width if (layer + 1) % FAMILIES[family].pattern else 0 for layer, width in enumerate(windows))
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    bos, eos = (_special(metadata, f"tokenizer.ggml.{name}_token_id", vocab_size, source) for name in ("bos", "eos"))
    first = "model.layers.0."
    channels = "expert_feed_forward_length"
    sizes = Dimensions(
        family=family,
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=whole("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=whole(channels if f"{kind}.{channels}" in metadata else "feed_forward_length"),
        max_model_len=min(longest, rotary_limit(scaling, source, longest)),
        tie_embeddings="lm_head.weight" not in tensors,
        experts=whole("expert_count") if mixture else 1,
        active_experts=whole("expert_used_count") if mixture else 1,
    )
    if FAMILIES[family].fused:
        tensors = _cut(sizes, tensors)
    config = ModelConfig(
        **asdict(sizes),
        norm_eps=positive(metadata, f"{kind}.attention.layer_norm_rms_epsilon", source),
        inv_freq=padded(inv_freq, head_dim),
        rope_scale=rotary_scale(scaling, source, longest),
        windows=windows,
        local_inv_freq=rotary_frequencies(head_dim, base, {}, source) if (base := FAMILIES[family].local_base) else (),
        unrotated=tuple(range(UNROTATED - 1, num_layers, UNROTATED)) if family == "smollm3" else (),
        factors=_factors(metadata, sizes, source),
        qkv_bias=FAMILIES[family].qkv_bias or first + "self_attn.q_proj.bias" in tensors,
        output_bias=first + "self_attn.o_proj.bias" in tensors,
        mlp_bias=first + "mlp.down_proj.bias" in tensors,
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
    )
    return check(config, source), tensors


def _factors(metadata: dict[str, object], sizes: Dimensions, source: str) -> tuple[tuple[str, float], ...]:
    """`factors` of a ModelConfig. A query and a key of Gemma are scaled by the size of a head, as llama.cpp has it."""
    if sizes.family == "granite":
        names = ("embedding_scale", "logit_scale", "residual_scale")
        embedding, logits, residual = (positive(metadata, f"granite.{name}", source, 1.0) for name in names)
        attention = positive(metadata, "granite.attention.scale", source, sizes.head_dim**-0.5)
        return granite(sizes, embedding, logits, residual, attention)
    return gemma(sizes, sizes.head_dim) if sizes.family == "gemma3_text" else ()


def _cut(sizes: Dimensions, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of fused matrices as tensors of their own."""
    cut: dict[str, Tensor] = {}
    for name, whole in tensors.items():
        module = name.split(".")[-2] if "." in name else ""
        parts = fused_rows(sizes).get(module)
        if parts is None or sum(parts.values()) != whole.shape[0]:
            cut[name] = whole
            continue
        offset = whole.offset
        for part, rows in parts.items():
            shape = (rows, *whole.shape[1:])
            cut[name.replace(module, part)] = own = Tensor(whole.path, whole.name, shape, whole.kind, offset)
            offset += own.num_bytes
    return cut


def _single(mixture: Experts, count: int, stored: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The matrices and biases of single experts as tensors of their own, under their Hugging Face names."""
    single: dict[str, Tensor] = {}
    for name, whole in stored.items():
        if (match := EXPERTS.fullmatch(name)) is None:
            single[name] = whole
            continue
        layer, kind, end = match.groups()
        if whole.shape[0] != count or len(whole.shape) < 2:
            raise CheckpointError(f"{source}: {name!r} has shape {whole.shape}, the configuration says {count} experts")
        for expert in range(count):
            own = dict(zip(("gate", "up", "down"), mixture.matrices(expert), strict=True))[kind]
            offset = whole.offset + expert * (whole.num_bytes // count)
            single[f"model.layers.{layer}.{own}.{end}"] = Tensor(whole.path, name, whole.shape[1:], whole.kind, offset)
    return single


def _special(metadata: dict[str, object], key: str, vocab_size: int, source: str) -> int | None:
    """The token id under `key`; None without the key. Raises CheckpointError for a value that is no token id of the model."""
    id = metadata.get(key)
    if id is not None and (not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size):
        what = f"{key!r} is {id!r}, expected a token id from 0 to {vocab_size - 1}"
        raise CheckpointError(f"{source}: {what}; correct it (gguf-set-metadata FILE KEY ID), or take another file")
    return id


def _scaling(metadata: dict[str, object], prefix: str, longest: int, source: str) -> dict[str, object]:
    """Rotary scaling under the keys of config.json, read as llama.cpp reads it (src/llama-model.cpp). A factor without a type is
    linear; `rope.scale_linear` is its older name. A factor of 0, or none, is no scaling."""
    at = f"{prefix}scaling."
    kind, factor = metadata.get(f"{at}type", "linear"), metadata.get(f"{at}factor", metadata.get(f"{prefix}scale_linear"))
    if kind == "none" or (kind in ("linear", "yarn") and not factor):
        return {}
    scaling = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": metadata.get(f"{at}original_context_length"),
        "beta_fast": metadata.get(f"{at}yarn_beta_fast"),
        "beta_slow": metadata.get(f"{at}yarn_beta_slow"),
    }
    sharper = metadata.get(f"{at}attn_factor", metadata.get(f"{at}yarn_attn_factor"))
    if kind == "yarn" and sharper is not None:
        own = rotary_scale(scaling, source, longest)
        scaling["attention_factor"] = own * positive({"attn_factor": sharper}, "attn_factor", source)
    return scaling


def _name(name: str, kind: str) -> str:
    """The Hugging Face name of a tensor in a GGUF file of this architecture. Unknown names stay as they are."""
    names = NAMES | OWN_NAMES.get(kind, {})
    prefix, rest = "", name
    if name.startswith("blk."):
        layer, _, rest = name.removeprefix("blk.").partition(".")
        prefix = f"model.layers.{layer}."
    stem, _, end = rest.rpartition(".")
    if stem == "attn_sinks":
        return f"{prefix}{names[stem]}"
    return f"{prefix}{names[stem]}.{end}" if stem in names else name


def _read(config: ModelConfig, tensors: dict[str, Tensor], name: str) -> np.ndarray:
    values = tensors[name].read()
    order = _halves(config, name)
    return np.ascontiguousarray(values if order is None else values[order])


def _blocks(config: ModelConfig, tensors: dict[str, Tensor], name: str) -> Blocks:
    blocks = from_ggml(tensors[name].raw(), tensors[name].kind)
    order = _halves(config, name)
    return blocks if order is None else blocks.ordered(order)


def _halves(config: ModelConfig, name: str) -> np.ndarray | None:
    """The order of rows that puts the two halves of each rotary pair half a head apart; None if they are."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if not heads or not FAMILIES[config.family].halves:
        return None
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).ravel()
