"""Random blocks of every GGUF type that is read, and their weights as the `gguf` package decodes them.

    pip install gguf numpy safetensors
    python tests/goldens/blocks.py

writes tests/goldens/blocks/model.safetensors: for each type `T.blocks` U8 [rows, bytes of 256 weights] and `T.weights`
F32 [rows, 256]. Seeded: the same package gives the same file.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

ROWS = 6
WIDTH = 256

# Where a block keeps its half-precision scales: random bits there would be infinities and NaN.
HALVES = {
    "Q4_0": [0],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "NVFP4": [],
}

# Zero, a subnormal and the largest number, besides ordinary ones.
AWKWARD = np.array([0.0, 3e-7, 65504.0], dtype=np.float16)


def blocks_of(kind: str, random: np.random.Generator) -> np.ndarray:
    length, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = ROWS * WIDTH // length
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = random.normal(0, 0.05, count).astype(np.float16)
        scales[: len(AWKWARD)] = AWKWARD
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "NVFP4":
        # Four unsigned E4M3 scales, 0x7F (NaN) being read as 0.
        blocks[:, :4] &= 0x7F
        blocks[0, 0] = 0x7F
    return blocks.reshape(ROWS, -1)


def main() -> None:
    random = np.random.default_rng(7)
    tensors = {}
    for kind in HALVES:
        blocks = blocks_of(kind, random)
        weights = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32)
        assert weights.shape == (ROWS, WIDTH) and np.isfinite(weights).all(), kind
        tensors[f"{kind}.blocks"] = np.ascontiguousarray(blocks)
        tensors[f"{kind}.weights"] = weights
    save_file(tensors, Path(__file__).parent / "blocks" / "model.safetensors")


if __name__ == "__main__":
    main()
