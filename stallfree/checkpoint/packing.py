"""The layouts in which AWQ, GPTQ and compressed-tensors pack matrices of four bits.

`quantization_config` in config.json says which. Sources: AutoAWQ's `WQLinear_GEMM`, GPTQModel's `TorchQuantLinear`, and
compressed-tensors' `pack_quantized`. It knows no files, and not what runs the matrices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.dimensions import CheckpointError

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in 32 bits AWQ has the code of each of eight outputs, counted in codes from the lowest bits."""
SUFFIXES = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}
"""The ends of the names of packed matrices, by method."""
KNOWN = "4-bit AWQ (gemm), GPTQ and compressed-tensors (pack-quantized) are supported; so are GGUF files and folders without it"

Read = Callable[[str], np.ndarray]
"""Gives a tensor by its name, in the type that it has in the file."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the matrices of a folder are packed. `method`: a key of `SUFFIXES`; `offset`: what is added to the zeros that GPTQ
    stores; `symmetric`: there are no zeros, they are 8."""

    method: str
    offset: int = 0
    symmetric: bool = False

    @classmethod
    def of(cls, values: object, source: str) -> "Packing":
        """From `quantization_config`. Raises CheckpointError for what is not supported."""
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: quantization_config is {str(values)[:80]}, expected an object")
        method = values.get("quant_method")
        if method == "compressed-tensors":
            return cls._compressed(values, source)
        bits = values.get("bits", values.get("w_bit"))
        layout = values.get("version", "gemm") if method == "awq" else values.get("checkpoint_format", "gptq")
        layouts = {"awq": {"gemm": 0}, "gptq": {"gptq": 1, "gptq_v2": 0}}
        if method not in layouts or bits != 4 or str(layout).lower() not in layouts[method]:
            what = f"quant_method {method!r}, {bits} bits, layout {layout!r}"
            raise CheckpointError(f"{source}: weights quantised by {what} are not supported; {KNOWN}")
        return cls(method, layouts[method][str(layout).lower()])

    @classmethod
    def _compressed(cls, values: Mapping[str, object], source: str) -> "Packing":
        groups = values.get("config_groups")
        schemes = [each.get("weights") for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
        scheme = schemes[0] if len(schemes) == 1 and isinstance(schemes[0], dict) else {}
        inputs = [each.get("input_activations") for each in groups.values()] if isinstance(groups, dict) and schemes else []
        known = values.get("format") == "pack-quantized" and (scheme.get("num_bits"), scheme.get("type")) == (4, "int")
        if not known or scheme.get("strategy") not in ("group", "channel") or any(inputs):
            what = f"format {values.get('format')!r} with {len(schemes)} groups of matrices, weights {scheme or None}"
            raise CheckpointError(f"{source}: compressed-tensors in {what[:300]} are not supported; {KNOWN}")
        return cls("compressed-tensors", symmetric=bool(scheme.get("symmetric", True)))

    def matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """The packed matrices among these tensors, under the names that they would have unpacked, with their shapes [out, in]."""
        end = f".{SUFFIXES[self.method]}"
        found: dict[str, tuple[int, int]] = {}
        for name, shape in shapes.items():
            if name.endswith(end) and len(shape) == 2:
                rows, columns = shape
                out, inner = {"awq": (8 * columns, rows), "gptq": (columns, 8 * rows)}.get(self.method, (rows, 8 * columns))
                found[f"{name.removesuffix(end)}.weight"] = out, inner
        return found

    def dense(self, read: Read, stored: Mapping[str, object], name: str, shape: tuple[int, int], source: str) -> np.ndarray:
        """Matrix `name`, as `matrices` names it, [out, in] float32. `stored`: the names of all tensors. Raises CheckpointError if
        its parts do not fit together."""
        codes, scales, zeros, groups = self._checked(read, stored, name, shape, source)
        values: np.ndarray = scales[:, groups] * (codes - zeros[:, groups])
        return values

    def blocks(self, read: Read, stored: Mapping[str, object], name: str, shape: tuple[int, int], source: str) -> Blocks:
        """The same as blocks, for a matrix whose inputs are `side_by_side`."""
        codes, scales, zeros, _ = self._checked(read, stored, name, shape, source)
        return Blocks.of_codes(codes, scales, zeros)

    def side_by_side(self, read: Read, stored: Mapping[str, object], name: str, shape: tuple[int, int]) -> bool:
        """Whether the inputs of a group are side by side. With GPTQ's desc_act, and with actorder, they are not."""
        listed = self._listed(stored, name.removesuffix("weight"))
        if listed is None:
            return True
        groups = read(listed).ravel()
        number = int(groups.max(initial=0)) + 1
        return (
            groups.size == shape[1]
            and not shape[1] % number
            and bool((groups == np.arange(shape[1]) // (shape[1] // number)).all())
        )

    def _checked(
        self, read: Read, stored: Mapping[str, object], name: str, shape: tuple[int, int], source: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `_parts`, and the group of each input."""
        at = name.removesuffix("weight")
        try:
            codes, scales, zeros = self._parts(read, at)
            number = scales.shape[1]
            if codes.shape != shape or len(scales) != shape[0] or scales.shape != zeros.shape or shape[1] % (2 * number):
                raise ValueError(f"codes {codes.shape}, scales {scales.shape}, zeros {zeros.shape}")
            listed = self._listed(stored, at)
            groups = np.arange(shape[1]) // (shape[1] // number) if listed is None else read(listed).ravel()
            if groups.shape != shape[1:] or groups.min() < 0 or groups.max() >= number:
                raise ValueError(f"groups of inputs {groups.shape}, from {groups.min()} to {groups.max()}, of {number}")
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(f"{source}: the parts of packed {name!r} do not fit together: {error}; fetch it again") from None
        return codes, scales, zeros, groups

    @staticmethod
    def _listed(stored: Mapping[str, object], at: str) -> str | None:
        """The tensor that lists the group of each input, if there is one."""
        return next((f"{at}{part}" for part in ("g_idx", "weight_g_idx") if f"{at}{part}" in stored), None)

    def _parts(self, read: Read, at: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes [out, in] uint8; scales and zeros [out, groups] float32."""
        if self.method == "compressed-tensors":
            codes, scales = _unpacked(read(f"{at}weight_packed")), read(f"{at}weight_scale")
            if self.symmetric:
                return codes, scales, np.full_like(scales, 8)
            zeros = _unpacked(read(f"{at}weight_zero_point").T).T
            return codes, scales, zeros[: len(codes)].astype(np.float32)
        scales = np.ascontiguousarray(read(f"{at}scales").T)
        if self.method == "awq":
            codes, zeros = (_unpacked(read(f"{at}{part}"), AWQ_ORDER) for part in ("qweight", "qzeros"))
            return np.ascontiguousarray(codes.T), scales, np.ascontiguousarray(zeros.T, np.float32)
        codes, zeros = _unpacked(read(f"{at}qweight").T), _unpacked(read(f"{at}qzeros")).T
        return codes, scales, np.ascontiguousarray(zeros, np.float32) + np.float32(self.offset)


def _unpacked(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Codes uint8 of int32 words, eight for each, along the last axis."""
    shifts = 4 * np.array(order, np.uint32)
    codes = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & 15
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)
