"""Make the files that the benchmarks read: checkpoints, each with a safetensors twin that holds the same tensors.

    python benchmarks/make_files.py [--force]

- many.pth:      10,000 fp32 matrices of 4 KB, with the names of a mixture-of-experts LoRA: opening and small reads.
- many_100.pth, many_1000.pth, many_100000.pth: so many of them.
- model.pth:     a decoder of 2.3 GB: 131 MB of fp16 embedding, 40 bf16 layers of 52 MB, 131 MB of fp16 head.
- layers_1.pth, layers_4.pth, layers_13.pth: so many of those layers alone.
- tiny.pth:      two small tensors. Each contestant reads it before the clock starts, so that no lazy import is timed.

The files land in benchmarks/.cache, some 8 GB, and are used again as long as this file does not change.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE = (Path(__file__).parent / ".cache").resolve()

StateDict = dict[str, torch.Tensor]

MANY = 10_000
MANY_SHAPE = (32, 32)
OTHER_COUNTS = (100, 1_000, 100_000)

HIDDEN, VOCABULARY, LAYERS = 2048, 32_000, 40
OTHER_LAYERS = (1, 4, 13)
EMBEDDING = "model.embed_tokens.weight"
LAYER_SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.qkv_proj.weight": (HIDDEN + 2 * HIDDEN // 4, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (2496, HIDDEN),
    "mlp.up_proj.weight": (2496, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, 2496),
}


def many(count: int = MANY) -> StateDict:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(MANY_SHAPE, generator=generator) for name in itertools.islice(expert_names(), count)}


def expert_names() -> Iterator[str]:
    for layer in itertools.count():
        for expert, projection, side in itertools.product(range(16), ("gate_proj", "up_proj", "down_proj"), "AB"):
            yield f"base_model.model.layers.{layer}.mlp.experts.{expert}.{projection}.lora_{side}.weight"


def noise(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Random bits below 0x3C00, which is 1.0 in fp16: as good as weights, and made faster than randn.
    return torch.randint(0, 0x3C00, shape, dtype=torch.int16, generator=generator).view(dtype)


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor


def layer_shapes(count: int) -> Shapes:
    return {
        f"model.layers.{layer}.{name}": (shape, torch.bfloat16)
        for layer in range(count)
        for name, shape in LAYER_SHAPES.items()
    }


def model_shapes() -> Shapes:
    return {
        EMBEDDING: ((VOCABULARY, HIDDEN), torch.float16),
        **layer_shapes(LAYERS),
        "model.norm.weight": ((HIDDEN,), torch.bfloat16),
        "lm_head.weight": ((VOCABULARY, HIDDEN), torch.float16),
    }


def filled(shapes: Shapes, seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {name: noise(generator, shape, dtype) for name, (shape, dtype) in shapes.items()}


def tiny() -> StateDict:
    return {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(7, 2, dtype=torch.bfloat16)}


FILES: dict[str, Callable[[], StateDict]] = {
    "tiny": tiny,
    "many": many,
    **{f"many_{count}": lambda count=count: many(count) for count in OTHER_COUNTS},
    "model": lambda: filled(model_shapes(), seed=2),
    **{f"layers_{count}": lambda count=count: filled(layer_shapes(count), seed=3) for count in OTHER_LAYERS},
}


def make(force: bool = False) -> None:
    """Write what is missing; a stamp tells whether the files came from this version of the recipe."""
    stamp = CACHE / "recipe.sha256"
    recipe = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()
    if force or not stamp.exists() or stamp.read_text() != recipe:
        CACHE.mkdir(exist_ok=True)
        stamp.unlink(missing_ok=True)
        for name, build in FILES.items():
            tensors = build()
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            print(f"{name}.pth and its safetensors twin: {len(tensors)} tensors, {nbytes / 1e6:,.1f} MB", flush=True)
            torch.save(tensors, CACHE / f"{name}.pth")
            save_file(tensors, str(CACHE / f"{name}.safetensors"))
        stamp.write_text(recipe)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="make them again")
    make(parser.parse_args().force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
