"""Integrations: the loading functions of other libraries, under patch_torch_load, give the weights that they give without.

Skipped where a library is not installed; `make test-integrations` installs them.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer import dropin

torch = pytest.importorskip("torch")

# They warn of one another's versions and of their own plans.
pytestmark = pytest.mark.filterwarnings("ignore")

WAYS = [{"lazy": False}, {"lazy": True}]


def library(name: str) -> Any:
    if os.environ.get("ZIPSLICER_REQUIRE_INTEGRATIONS") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-integrations", exc_type=ImportError)


@pytest.fixture(params=WAYS, ids=str)
def patch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The patch, without fallback; after the test, that zipslicer has read at least one file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    calls = []
    load = dropin._load

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return load(*args, **kwargs)

    entered = []

    def enter() -> Any:
        entered.append(True)
        return zipslicer.patch_torch_load(**request.param, fallback=False)

    monkeypatch.setattr(dropin, "_load", counted)
    yield enter
    assert bool(calls) == bool(entered)  # a test that skips enters nothing


def llama(transformers: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=600
        )
    )


def sharded(model: Any, folder: Path, count: int = 3) -> Path:
    """As save_pretrained wrote it before safetensors."""
    state = model.state_dict()
    weight_map = {}
    for i in range(count):
        shard = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = {name: state[name] for name in list(state)[i::count]}
        torch.save(part, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    total = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if hasattr(model, "config"):
        model.config.save_pretrained(folder)
    return folder


def assert_equal(wanted: Any, got: Any) -> None:
    assert list(wanted) == list(got)
    for name, tensor in wanted.items():
        assert type(got[name]) is torch.Tensor, name
        assert (tensor.dtype, tensor.device) == (got[name].dtype, got[name].device), name
        assert torch.equal(tensor, got[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_sharded(patch: Any, tmp_path: Path, dtype: str) -> None:
    transformers = library("transformers")
    folder = sharded(llama(transformers), tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained
    wanted = load(folder, use_safetensors=False, dtype=dtype)
    with patch():
        got = load(folder, use_safetensors=False, dtype=dtype)
    assert_equal(wanted.state_dict(), got.state_dict())
    ids = torch.arange(5)[None]
    assert torch.equal(wanted(ids).logits, got(ids).logits)
    got(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in got.parameters())


def test_transformers_one_file(patch: Any, tmp_path: Path) -> None:
    transformers = library("transformers")
    model = llama(transformers)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with patch():
        got = transformers.LlamaForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert_equal(model.state_dict(), got.state_dict())


def test_transformers_says_what_is_wrong_with_a_file(patch: Any, tmp_path: Path) -> None:
    transformers = library("transformers")
    llama(transformers).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with patch(), pytest.raises((OSError, ValueError)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("where", [None, {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_accelerate(patch: Any, tmp_path: Path, where: Any) -> None:
    transformers, accelerate = library("transformers"), library("accelerate")
    source = llama(transformers)
    folder = sharded(source, tmp_path)
    made: list[Any] = []
    for context in (None, patch()):
        there = tmp_path / f"offload{len(made)}"
        if where is None:
            torch.manual_seed(1)
            model = transformers.LlamaForCausalLM(source.config)
        else:
            with accelerate.init_empty_weights():
                model = transformers.LlamaForCausalLM(source.config)
        if context is None:
            accelerate.load_checkpoint_in_model(model, str(folder), device_map=where, offload_folder=str(there))
        else:
            with context:
                accelerate.load_checkpoint_in_model(model, str(folder), device_map=where, offload_folder=str(there))
        made.append((model.state_dict(), {path.name: path.read_bytes() for path in there.glob("*.dat")}))
    (wanted, offloaded), (got, offloaded_too) = made
    assert offloaded == offloaded_too
    on_cpu = [name for name in wanted if not wanted[name].is_meta]
    assert_equal({name: wanted[name] for name in on_cpu}, {name: got[name] for name in on_cpu})
    assert_equal({name: source.state_dict()[name] for name in on_cpu}, {name: got[name] for name in on_cpu})


def test_diffusers(patch: Any, tmp_path: Path) -> None:
    diffusers = library("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(64,), norm_num_groups=8)
    model.save_config(tmp_path)
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with patch():
        got = diffusers.AutoencoderKL.from_pretrained(tmp_path, use_safetensors=False)
    assert_equal(model.state_dict(), got.state_dict())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft(patch: Any, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    transformers, peft = library("transformers"), library("peft")
    config = peft.LoraConfig(r=64, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(transformers), config)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    with patch():
        got = peft.PeftModel.from_pretrained(llama(transformers), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(model.state_dict(), got.state_dict())


def iterated(files: list[Path]) -> Any:
    """As vLLM's pt_weights_iterator: it is written out here, vLLM itself needs a GPU machine to install."""
    for path in files:
        state = torch.load(path, map_location="cpu", weights_only=True)
        yield from state.items()
        del state


def test_a_loop_over_shards_like_that_of_vllm(patch: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    files = sorted(sharded(model, tmp_path).glob("*.bin"))
    into = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with patch():
        for name, tensor in iterated(files):
            into[name].copy_(tensor)
    assert_equal(model.state_dict(), into)
