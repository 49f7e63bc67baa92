"""LoRA adapters, written by hand in PEFT's form: merged to the bit, or refused with every reason."""

from __future__ import annotations

import json
import math
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from famexport.checkpoint import FAM_WEIGHT, init_checkpoint, open_checkpoint
from famexport.cli import _run
from famexport.config import preset
from famexport.convert import convert, lora, lora_file
from famexport.errors import CheckpointError, FamExportError, UsageError

NO_FAM = {"block_size": 8, "memory_segments": 8, "fam_length": 0}
PREFIX = "base_model.model."
FAM = f"{PREFIX}model.fam_embeddings.weight"
# preset "tiny": D=32, q and o 32 x 32, k and v 16 x 32, gate and up 64 x 32, down 32 x 64
Q0, V1, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q0: (32, 32), V1: (16, 32), DOWN1: (32, 64)}

# What PEFT 0.17 writes for a plain adapter, keys and defaults.
CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "owner/base", "bias": "none",
    "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj", "down_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pairs(
    shapes: dict[str, tuple[int, int]], rank: int | dict[str, int] = 4, stem: str = ""
) -> dict[str, torch.Tensor]:
    """A and B of each module, by the names that PEFT gives them."""
    found = {}
    for i, (module, (out, width)) in enumerate(shapes.items()):
        r = rank if isinstance(rank, int) else rank[module]
        found[f"{PREFIX}{module}.lora_A.{stem}weight"] = random(r, width, seed=2 * i)
        found[f"{PREFIX}{module}.lora_B.{stem}weight"] = random(out, r, seed=2 * i + 1)
    return found


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(pairs(SHAPES) if tensors is None else tensors, path / lora_file.WEIGHTS)
    (path / lora_file.CONFIG).write_text(json.dumps(CONFIG | changes))
    return path


def by_hand(base: torch.Tensor, tensors: dict[str, torch.Tensor], module: str, scaling: float) -> torch.Tensor:
    a, b = (tensors[f"{PREFIX}{module}.lora_{half}.weight"].float() for half in "AB")
    return base.float() + scaling * (b @ a)


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of famexport's own, T=8, M=2, F=4."""
    return init_checkpoint(tmp_path / "source", preset("tiny"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same weights as a Hugging Face model that never heard of FAM."""
    path = init_checkpoint(tmp_path / "plain", preset("tiny", fam_length=0))
    data = json.loads((path / "config.json").read_text())
    del data["fam"]
    (path / "config.json").write_text(json.dumps(data))
    return path


@pytest.fixture
def refused(source: Path, tmp_path: Path) -> Callable[..., str]:
    def refuse(adapter: Path, error: type[FamExportError] = CheckpointError, **options: Any) -> str:
        """Convert with an adapter that must be refused, and check that nothing is left; the message."""
        before = listing(tmp_path)
        with pytest.raises(error) as caught:
            convert(source, tmp_path / "out", lora=adapter, **options)
        assert listing(tmp_path) == before
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        return str(caught.value)

    return refuse


# Merging


@pytest.mark.parametrize("stem", ["", "default."])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merged_weights_are_those_merged_by_hand(dtype: str, stem: str, tmp_path: Path) -> None:
    source = init_checkpoint(tmp_path / "source", preset("tiny"), dtype=dtype)
    write(tmp_path / "adapter", pairs(SHAPES, stem=stem))
    for target in (dtype, "float32", "bfloat16"):
        asked = None if target == dtype else target
        base, got = weights(source), weights(convert(source, tmp_path / "out", lora=tmp_path / "adapter", dtype=asked))
        assert got.keys() == base.keys()
        for name, weight in got.items():
            expected, module = base[name], name.removesuffix(".weight")
            if module in SHAPES:
                expected = by_hand(expected, pairs(SHAPES), module, 6 / 4)
                assert (expected - base[name].float()).abs().max() > 0.1
            assert weight.dtype is getattr(torch, target)
            assert torch.equal(weight, expected.to(weight.dtype)), name


def test_adapters_of_half_precision_are_multiplied_in_float32(source: Path, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        halves = {name: tensor.to(dtype) for name, tensor in pairs(SHAPES).items()}
        got = weights(convert(source, tmp_path / "out", lora=write(tmp_path / "adapter", halves)))
        name = f"{Q0}.weight"
        assert torch.equal(got[name], by_hand(weights(source)[name], halves, Q0, 1.5))


def test_a_few_rows_at_a_time_give_the_same_bits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "adapter")
    whole = convert(source, tmp_path / "whole", lora=tmp_path / "adapter")
    monkeypatch.setattr(lora, "CHUNK_BYTES", 5 * 32 * 4)  # five rows of 32, so that no matrix divides evenly
    sizes, cast = [], lora.cast

    def noted(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        sizes.append(tensor.numel() if name.endswith("with its LoRA") else 0)
        return cast(name, tensor, dtype)

    monkeypatch.setattr(lora, "cast", noted)
    parts = convert(source, tmp_path / "parts", lora=tmp_path / "adapter")
    assert 0 < max(sizes) < 5 * 32 + 64  # even parts: less than one row more
    assert listing(whole) == listing(parts)
    monkeypatch.setattr(lora, "CHUNK_BYTES", 1)
    rows = weights(convert(source, tmp_path / "rows", lora=tmp_path / "adapter"))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(rows[name], weight, atol=1e-6, rtol=1e-6)


def test_one_weight_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A and B are read when their weight is written, not kept."""
    write(tmp_path / "adapter", pairs({f"model.layers.{i}.mlp.up_proj": (64, 32) for i in (0, 1)}), target_modules=None)
    alive, most, read = 0, 0, lora._tensor

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal alive, most
        tensor = read(*arguments).clone()
        alive, most = alive + 1, max(most, alive + 1)

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(tensor, gone)
        return tensor

    monkeypatch.setattr(lora, "_tensor", counted)
    convert(source, tmp_path / "out", lora=tmp_path / "adapter")
    assert most == 2
    assert alive == 0


def test_scaling(source: Path, tmp_path: Path) -> None:
    base = weights(source)

    def scalings(ranks: dict[str, int], **changes: Any) -> list[float]:
        tensors = pairs(SHAPES, ranks)
        got = weights(convert(source, tmp_path / "out", lora=write(tmp_path / "adapter", tensors, **changes)))
        found = []
        for module in SHAPES:
            step = by_hand(torch.zeros(1), tensors, module, 1.0)
            found.append(
                float(((got[f"{module}.weight"] - base[f"{module}.weight"]) * step).sum() / (step * step).sum())
            )
        return found

    same = dict.fromkeys(SHAPES, 4)
    assert scalings(same) == pytest.approx([1.5] * 3, rel=1e-5)
    assert scalings(same, lora_alpha=-0.5) == pytest.approx([-0.125] * 3, rel=1e-5)
    assert scalings(same, use_rslora=True) == pytest.approx([3.0] * 3, rel=1e-5)
    ranks = {Q0: 2, V1: 4, DOWN1: 8}
    patterns = {"rank_pattern": {"q_proj": 2, DOWN1: 8}, "alpha_pattern": {"^model\\.layers.1.mlp.down_proj$": 16}}
    assert scalings(ranks, **patterns) == pytest.approx([3.0, 1.5, 2.0], rel=1e-5)
    assert scalings(ranks, **patterns, use_rslora=True) == pytest.approx(
        [6 / math.sqrt(2), 3.0, 16 / math.sqrt(8)], rel=1e-5
    )
    first = {"proj": 1, "^self_attn.v_proj": 1, "1.self_attn.v_proj": 12, "v_proj": 24, "down_proj": 8, "down_proj$": 9}
    assert scalings(same, alpha_pattern=first) == pytest.approx([1.5, 3.0, 2.0], rel=1e-5)  # whole parts, first match


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_base_and_adapter_side_by_side(
    family: str, tmp_path: Path, make_model: Callable[..., Any], logits_of: Callable[..., torch.Tensor]
) -> None:
    pytest.importorskip("transformers")
    model = make_model(family)
    model.save_pretrained(tmp_path / "hf")
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}  # lm_head too
    tensors = {n: t * 0.2 for n, t in pairs({n: tuple(m.weight.shape) for n, m in linear.items()}).items()}
    made = convert(tmp_path / "hf", tmp_path / "out", lora=write(tmp_path / "adapter", tensors), **NO_FAM)
    ids = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        for name, module in linear.items():
            a, b = (tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
            module.register_forward_hook(lambda _, x, y, a=a, b=b: y + 1.5 * (x[0] @ a.T) @ b.T)
        expected = model(ids).logits
    assert (expected - before).abs().max() > 0.5
    torch.testing.assert_close(logits_of(made, ids), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json was written")
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_gguf(kind: str, tmp_path: Path, make_model: Callable[..., Any], write_gguf: Callable[..., Path]) -> None:
    """llama.cpp's order of query and key rows is undone before the adapter, which has Hugging Face's, is added."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "llama", kind)
    shapes = {Q0: (64, 64), "model.layers.1.self_attn.k_proj": (32, 64), "lm_head": (96, 64)}
    tensors = {**pairs(shapes), FAM: random(5, 64)}
    write(tmp_path / "adapter", tensors, target_modules=None, fam={"block_size": 8, "memory_segments": 1})
    base = weights(convert(path, tmp_path / "base", fam_length=0, dtype="float32"))
    made = convert(path, tmp_path / "out", lora=tmp_path / "adapter")
    got, config = weights(made), open_checkpoint(made).config
    assert (config.block_size, config.memory_segments, config.fam_length) == (8, 1, 5)
    for module in shapes:
        weight = got[f"{module}.weight"]
        assert weight.dtype is {"F32": torch.float32, "BF16": torch.bfloat16, "Q8_0": torch.float16}[kind]
        assert torch.equal(weight, by_hand(base[f"{module}.weight"], tensors, module, 1.5).to(weight.dtype))
    assert torch.equal(got["model.norm.weight"], base["model.norm.weight"])
    assert torch.equal(got[FAM_WEIGHT], tensors[FAM])
    assert open_checkpoint(made).fam_trained


def test_hub_id(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famexport.convert.hf.download", lambda name: source)
    write(tmp_path / "adapter")
    got, local = (convert(s, tmp_path / "out", lora=tmp_path / "adapter") for s in ("owner/name", source))
    assert listing(got) == listing(local)
    monkeypatch.setattr("famexport.convert.hf.download", lambda name: pytest.fail("asked the hub"))
    (tmp_path / "adapter" / lora_file.CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        convert("owner/name", tmp_path / "out", lora=tmp_path / "adapter")


def test_merging_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter", {**pairs(SHAPES), FAM: random(3, 32)})
    made = [convert(source, tmp_path / name, lora=tmp_path / "adapter") for name in "ab"]
    assert listing(made[0]) == listing(made[1])


# FAM's embeddings and settings


@pytest.mark.parametrize("name", ["", "modules_to_save.", "modules_to_save.default."])
@pytest.mark.parametrize("saved", [None, ["fam_embeddings"], ["model.fam_embeddings"]])
def test_fam_embeddings(name: str, saved: list[str] | None, source: Path, plain: Path, tmp_path: Path) -> None:
    rows = random(6, 32)
    tensors = {**pairs(SHAPES), f"{PREFIX}model.fam_embeddings.{name}weight": rows}
    write(tmp_path / "adapter", tensors, modules_to_save=saved)
    for start in (source, plain):  # F=4, and without any
        checkpoint = open_checkpoint(convert(start, tmp_path / "out", lora=tmp_path / "adapter"))
        assert checkpoint.config.fam_length == 6
        assert checkpoint.fam_trained
        assert torch.equal(checkpoint.tensor(FAM_WEIGHT), rows)
    same = convert(plain, tmp_path / "out", lora=tmp_path / "adapter", fam_length=6, dtype="bfloat16")
    assert torch.equal(weights(same)[FAM_WEIGHT], rows.bfloat16())


def test_without_fam_embeddings_the_sources_stay(source: Path, plain: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    for trained in (False, True):
        data = json.loads((source / "config.json").read_text())
        data["fam"]["trained"] = trained
        (source / "config.json").write_text(json.dumps(data))
        checkpoint = open_checkpoint(convert(source, tmp_path / "out", lora=tmp_path / "adapter"))
        assert checkpoint.fam_trained is trained
        assert torch.equal(checkpoint.tensor(FAM_WEIGHT), weights(source)[FAM_WEIGHT])
    sampled = open_checkpoint(convert(plain, tmp_path / "out", lora=tmp_path / "adapter"))
    assert (sampled.config.fam_length, sampled.fam_trained) == (16, False)


def test_an_adapter_of_fam_embeddings_alone(plain: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter", {FAM: random(3, 32)}, target_modules=[])
    got = weights(convert(plain, tmp_path / "out", lora=tmp_path / "adapter"))
    assert torch.equal(got.pop(FAM_WEIGHT), random(3, 32))
    assert all(
        torch.equal(weight, got[name]) for name, weight in weights(convert(plain, tmp_path / "b", fam_length=0)).items()
    )


def test_fam_embeddings_of_another_length_than_asked_for(refused: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "adapter", {**pairs(SHAPES), FAM: random(6, 32)})
    for asked in (4, 0):
        message = refused(tmp_path / "adapter", UsageError, fam_length=asked)
        assert f"FAM embeddings of length 6, fam_length {asked} was asked for; leave fam_length out" in message
    write(tmp_path / "adapter", {**pairs(SHAPES), FAM: random(6, 32)}, fam={"fam_length": 5})
    assert "fam.fam_length is 5, but there are 6 FAM embeddings" in refused(tmp_path / "adapter")
    write(tmp_path / "adapter", {**pairs(SHAPES), FAM: random(9, 32)})
    with pytest.raises(FamExportError, match=r"fam_length \(9\) must not exceed block_size \(8\)"):
        convert(tmp_path / "source", tmp_path / "out", lora=tmp_path / "adapter")


def test_fam_settings_go_before_the_defaults(plain: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter", fam={"block_size": 24, "memory_segments": 0, "fam_length": 7})

    def settings(**options: int) -> tuple[int, int, int]:
        config = open_checkpoint(convert(plain, tmp_path / "out", lora=tmp_path / "adapter", **options)).config
        return config.block_size, config.memory_segments, config.fam_length

    assert settings() == (24, 0, 7)
    assert settings(block_size=32, fam_length=0) == (32, 0, 0)
    write(tmp_path / "adapter", fam={"memory_segments": 1})
    assert settings() == (128, 1, 16)


def test_fam_settings_that_the_source_contradicts(refused: Callable[..., str], source: Path, tmp_path: Path) -> None:
    write(tmp_path / "adapter", fam={"block_size": 16, "memory_segments": 2, "fam_length": 5})
    message = refused(tmp_path / "adapter", UsageError)
    assert "2 problems: it was trained with block_size 16, the source has 8; say block_size; " in message
    assert "fam_length 5, the source has 4; say fam_length" in message
    assert "memory_segments" not in message
    config = open_checkpoint(
        convert(source, tmp_path / "out", lora=tmp_path / "adapter", block_size=16, fam_length=4)
    ).config
    assert (config.block_size, config.memory_segments, config.fam_length) == (16, 2, 4)


# Refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "option peft_type='LOHA' is not supported"),
    "no method": ({"peft_type": None}, "option peft_type=None is not supported"),
    "DoRA": ({"use_dora": True}, "option use_dora=True is not supported"),
    "QA-LoRA": ({"use_qalora": True}, "option use_qalora=True is not supported"),
    "bias of B": ({"lora_bias": True}, "option lora_bias=True is not supported"),
    "bias": ({"bias": "lora_only"}, "option bias='lora_only' is not supported"),
    "transposed": ({"fan_in_fan_out": True}, "option fan_in_fan_out=True is not supported"),
    "stacked layers": ({"layer_replication": [[0, 1]]}, "option layer_replication=[[0, 1]] is not supported"),
    "token rows": ({"trainable_token_indices": [1]}, "option trainable_token_indices=[1] is not supported"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "option alora_invocation_tokens=[1] is not supported"),
    "base changed": ({"init_lora_weights": "pissa_niter_4"}, "option init_lora_weights='pissa_niter_4' is not"),
    "unknown": ({"use_next_idea": 1}, "option use_next_idea=1 is not supported"),
    "scaling's kind": ({"use_rslora": "yes"}, "option use_rslora='yes' is not supported"),
    "other modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save='lm_head' is not supported"),
    "modules no list": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of at most 1000 names"),
    "nothing saved": ({"modules_to_save": ["fam_embeddings"]}, "names fam_embeddings, of which there is no tensor"),
    "r of 0": ({"r": 0}, "r must be a whole number from 1 to 8192, got 0"),
    "r below 0": ({"r": -4}, "r must be a whole number from 1 to 8192, got -4"),
    "r beyond": ({"r": 8193}, "r must be a whole number from 1 to 8192, got 8193"),
    "r true": ({"r": True}, "r must be a whole number from 1 to 8192, got True"),
    "r half": ({"r": 4.0}, "r must be a whole number from 1 to 8192, got 4.0"),
    "no r": ({"r": None}, "r must be a whole number from 1 to 8192, got None"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha must be a number, got '8'"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha must be a number, got nan"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha must be a number, got inf"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
    "pattern's rank": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' must be a whole number from 1"),
    "pattern's alpha": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' must be a number, got None"),
    "expression": ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern of '(a+)+b' is not supported: expected the name"),
    "empty name": ({"alpha_pattern": {"": 4}}, "alpha_pattern of '' is not supported"),
    "no patterns": ({"rank_pattern": [1]}, "rank_pattern must be an object of at most 1000 names, got [1]"),
    "many patterns": ({"alpha_pattern": {f"a{i}": 1 for i in range(1001)}}, "alpha_pattern must be an object of at most"),
    "rank pattern": ({"rank_pattern": {"v_proj": 2}}, "v_proj.lora_A.weight has shape [4, 32], expected [2, 32]"),
    "unknown target": ({"target_modules": ["q_proj", "wq"]}, "the model has no linear layer 'wq' to target"),
    "tied head": ({"target_modules": ["lm_hea"]}, "the model has no linear layer 'lm_hea' to target"),
    "part of a name": ({"target_modules": ["proj"]}, "the model has no linear layer 'proj' to target"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "the model has no linear layer 'embed_tokens' to target"),
    "target without": ({"target_modules": ["q_proj", "k_proj"]}, "target module 'k_proj' has no tensors"),
    "target no name": ({"target_modules": [1]}, "target_modules must be a list of at most 1000 names, got [1]"),
    "fam no object": ({"fam": [1]}, "fam must be an object, got [1]"),
    "fam unknown": ({"fam": {"blocksize": 8}}, "unknown key fam.blocksize; expected block_size, memory_segments, fam_"),
    "fam text": ({"fam": {"block_size": "8"}}, "fam.block_size must be a whole number, got '8'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_refused(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    changes, named = REFUSED[case]
    assert named in refused(write(tmp_path / "adapter", **changes))


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in pairs(SHAPES).items() if name not in key}


def changed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return pairs(SHAPES) | {f"{PREFIX}{name}": tensor}


def poisoned(value: float) -> torch.Tensor:
    tensor = random(16, 4)
    tensor[3, 1] = value
    return tensor


TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "A alone": (without("q_proj.lora_B"), f"'{Q0}' has no lora_B"),
    "B alone": (without("q_proj.lora_A"), f"'{Q0}' has no lora_A"),
    "none": ({}, "adapter_model.safetensors holds no tensors"),
    "twice": (changed(f"{Q0}.lora_A.default.weight", random(4, 32)), "are the same weight"),
    "an embedding's": (changed("model.embed_tokens.lora_embedding_A", random(4, 96)), "lora_embedding_A' is neither"),
    "an embedding as linear": (
        changed("model.embed_tokens.lora_A.weight", random(4, 32)), "no linear layer 'model.embed_tokens'"),
    "FAM's as linear": (
        changed("model.fam_embeddings.lora_A.weight", random(4, 32)), "no linear layer 'model.fam_embeddings'"),
    "magnitudes": (changed(f"{Q0}.lora_magnitude_vector", random(32)), "lora_magnitude_vector' is neither"),
    "bias": (changed(f"{Q0}.lora_B.bias", random(32)), "q_proj.lora_B.bias' is neither"),
    "whole module": (changed("lm_head.weight", random(96, 32)), "lm_head.weight' is neither"),
    "head's base": (changed("lm_head.base_layer.weight", random(96, 32)), "save_embedding_layers=False"),
    "norm": (changed("model.norm.weight", random(32)), "model.norm.weight' is neither"),
    "other adapter": (changed(f"{Q0}.lora_A.mine.weight", random(4, 32)), "lora_A.mine.weight' is neither"),
    "other layer": (changed("model.layers.2.self_attn.q_proj.lora_A.weight", random(4, 32)), "no linear layer 'model.layers.2"),
    "transposed": (changed(f"{Q0}.lora_A.weight", random(32, 4)), "has shape [32, 4], expected [4, 32]"),
    "narrow": (changed(f"{V1}.lora_B.weight", random(15, 4)), "has shape [15, 4], expected [16, 4]"),
    "flat": (changed(f"{V1}.lora_B.weight", random(64)), "has shape [64], expected [16, 4]"),
    "empty": (changed(f"{V1}.lora_B.weight", random(16, 0)), "has shape [16, 0], expected [16, 4]"),
    "NaN": (changed(f"{V1}.lora_B.weight", poisoned(math.nan)), "v_proj.lora_B.weight holds NaN or infinite values"),
    "infinite": (changed(f"{V1}.lora_B.weight", poisoned(-math.inf)), "v_proj.lora_B.weight holds NaN or infinite"),
    "NaN in half": (changed(f"{V1}.lora_B.weight", poisoned(math.nan).half()), "holds NaN or infinite values"),
    "integers": (changed(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), "is int8, expected float32, float16"),
    "FAM's width": (changed("model.fam_embeddings.weight", random(4, 31)), "has shape [4, 31], expected [4, 32]"),
    "FAM's rank": (changed("model.fam_embeddings.weight", random(32)), "FAM embeddings have shape [32], expected [F, D]"),
    "FAM's none": (changed("model.fam_embeddings.weight", random(0, 32)), "FAM embeddings have shape [0, 32], expected"),
    "FAM's NaN": (changed("model.fam_embeddings.weight", random(2, 32) / 0), "fam_embeddings.weight holds NaN or infinite"),
    "FAM's twice": (
        changed("model.fam_embeddings.weight", random(2, 32)) | changed("model.fam_embeddings.modules_to_save.weight", random(2, 32)),
        "are the same weight"),
    "FAM's original": (changed("model.fam_embeddings.original_module.weight", random(2, 32)), "original_module.weight' is neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    tensors, named = TENSORS[case]
    assert named in refused(write(tmp_path / "adapter", tensors))


def test_names_of_many_parts_cost_no_memory(refused: Callable[..., str], tmp_path: Path) -> None:
    """All ends of a name of 20,000 parts are 380 MB."""
    name = PREFIX + "a." * 20_000 + "x"
    adapter = write(tmp_path / "adapter", {f"{name}.lora_{half}.weight": random(4, 4) for half in "AB"})
    refused(adapter)  # imports what it needs
    tracemalloc.start()
    try:
        assert "the model has no linear layer 'a.a.a" in refused(adapter)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_keys_that_are_a_terminals_commands_are_shown_as_text(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused(write(tmp_path / "adapter", **{"\x1b[2J": 1, "fam": {"\x1b]0;x\x07": 8}}))
    assert message.isprintable()
    assert r"option \x1b[2J=1 is not supported" in message
    assert r"unknown key fam.\x1b]0;x\x07; expected" in message


def test_one_error_names_all_problems(refused: Callable[..., str], tmp_path: Path) -> None:
    tensors = changed(f"{V1}.lora_B.weight", poisoned(math.nan))
    tensors |= {f"{PREFIX}lm_head.lora_A.weight": random(4, 31), f"{PREFIX}x": random(2)}
    message = refused(write(tmp_path / "adapter", tensors, use_dora=True, bias="all", modules_to_save=["norm"]))
    assert message.startswith(f"LoRA adapter {tmp_path / 'adapter'} cannot be merged: 7 problems: ")
    for named in (
        "use_dora",
        "bias='all'",
        "'norm'",
        "lora_B.weight holds NaN",
        "'lm_head' has no lora_B",
        "[4, 31]",
        "x'",
    ):
        assert named in message
    message = refused(write(tmp_path / "adapter", {f"{PREFIX}{i}": random(1) for i in range(300)}))
    assert "; and " in message
    assert len(message) < 4000


def test_a_tied_models_head_has_no_weight_of_its_own(tmp_path: Path) -> None:
    source = init_checkpoint(tmp_path / "source", preset("tiny", tie_word_embeddings=True))
    write(tmp_path / "adapter", pairs({"lm_head": (96, 32)}), target_modules=["lm_head"])
    with pytest.raises(
        CheckpointError, match="2 problems: the model has no linear layer 'lm_head' to target; the model has"
    ):
        convert(source, tmp_path / "out", lora=tmp_path / "adapter")


def test_files_that_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    adapter, config, file = (
        tmp_path / "adapter",
        tmp_path / "adapter/adapter_config.json",
        tmp_path / "adapter" / lora_file.WEIGHTS,
    )
    assert "no such directory" in refused(adapter, UsageError)
    adapter.write_text("x")
    assert "no such directory" in refused(adapter, UsageError)
    adapter.unlink()
    write(adapter)
    whole, text = file.read_bytes(), config.read_text()
    for bad, named in {
        "": "not valid JSON", "[1]": "holds list, expected an object", "{" * 100_000: "not valid JSON",
        '{"r": 4, ' + text[1:]: "a key is there twice", text + " " * 2**20: "expected at most 1048576",
        '{"a":' * 50_000 + "1" + "}" * 50_000: "not valid JSON", '{"r": ' + "9" * 5000 + "}": "not valid JSON",
    }.items():  # fmt: skip
        config.write_text(bad)
        assert named in refused(adapter)
    config.write_bytes(b"\xff\xfe")
    assert "not valid JSON" in refused(adapter)
    config.unlink()
    assert "has no adapter_config.json; expected a LoRA adapter as PEFT saves it" in refused(adapter)
    config.write_text(text)
    for bad_bytes in (b"", whole[:-1], whole + b"x", whole[:100], (2**40).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(bad_bytes)
        assert lora_file.WEIGHTS in refused(adapter)
    file.unlink()
    assert "has no adapter_model.safetensors; expected a LoRA adapter" in refused(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04")
    message = refused(adapter)
    assert "pickled weights (adapter_model.bin) are not read" in message
    assert "save it again with save_pretrained(DIR, safe_serialization=True)" in message


def test_nothing_is_read_before_its_size_is_known(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers and shapes are checked first: a sparse file that claims gigabytes costs nothing."""
    adapter = write(tmp_path / "adapter")
    header: dict[str, Any] = {}
    end = 0
    for name, shape in ((f"{Q0}.lora_A", [4, 2**32]), (f"{Q0}.lora_B", [32, 4])):
        start, end = end, end + 4 * shape[0] * shape[1]
        header[f"{PREFIX}{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    (adapter / lora_file.WEIGHTS).write_bytes(len(data).to_bytes(8, "little") + data)
    with open(adapter / lora_file.WEIGHTS, "r+b") as file:
        file.truncate(8 + len(data) + end)
    asked: list[str] = []
    monkeypatch.setattr(lora, "_tensor", lambda _, entry: asked.append(entry.name) or torch.zeros(entry.shape))
    with pytest.raises(CheckpointError, match=r"has shape \[4, 4294967296\], expected \[4, 32\]"):
        convert(source, tmp_path / "out", lora=adapter)
    assert asked == [f"{PREFIX}{Q0}.lora_B.weight"]


def test_a_merge_that_overflows_leaves_the_old_checkpoint(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    before = listing(out)
    write(tmp_path / "adapter", {n: t * 300 for n, t in pairs(SHAPES).items()})
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight with its LoRA holds values up to .*, which float16 cannot"
    ):
        convert(source, out, lora=tmp_path / "adapter", dtype="float16")
    assert listing(out) == before
    assert not list(tmp_path.glob(".*"))
    convert(source, out, lora=tmp_path / "adapter", dtype="bfloat16")


def test_an_adapter_is_never_replaced(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    adapter = write(out / "adapter")
    for target in (out, adapter):
        with pytest.raises(UsageError, match="would replace its own source .*adapter; give another path"):
            convert(source, target, lora=adapter)
    assert (adapter / lora_file.WEIGHTS).is_file()


# The command


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = _run([str(argument) for argument in arguments], False)
    return (code, *capsys.readouterr())


def test_the_command_says_what_was_merged(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write(adapter, {**pairs(SHAPES, {Q0: 4, V1: 2, DOWN1: 4}), FAM: random(3, 32)}, rank_pattern={"v_proj": 2})
    code, text, err = command(capsys, "convert", source, "-o", out, "--lora", adapter)
    assert (code, err) == (0, "")
    assert text == f"{out}: 0.0M parameters, float32, 97.0 KiB, T=8 M=2 F=3, LoRA merged into 3 weights\n"
    code, text, err = command(capsys, "convert", source, "-o", out, "--lora", adapter, "--json")
    facts = json.loads(text)
    assert facts["checkpoint"] == str(out)
    assert facts["fam_trained"] is True
    assert facts["lora"] == {
        "path": str(adapter),
        "weights": 3,
        "modules": ["down_proj", "q_proj", "v_proj"],
        "ranks": [2, 4],
        "fam_embeddings": True,
    }
    _, text, _ = command(capsys, "convert", source, "-o", out, "--json")
    assert "lora" not in json.loads(text)
    assert command(capsys, "convert", source, "-o", out, "--lora", adapter, "--quiet") == (0, "", "")


def test_exit_codes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(code: int, adapter: Path, *options: object) -> str:
        got, out, err = command(capsys, "convert", source, "-o", tmp_path / "out", "--lora", adapter, *options)
        assert (got, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return err

    assert "no such directory" in fails(2, tmp_path / "none")
    write(tmp_path / "adapter", {FAM: random(3, 32)}, target_modules=None)
    assert "leave fam_length out" in fails(2, tmp_path / "adapter", "--fam-length", 4)
    assert "use_dora" in fails(3, write(tmp_path / "adapter", use_dora=True))
    (tmp_path / "adapter" / lora_file.WEIGHTS).rename(tmp_path / "adapter/adapter_model.bin")
    assert "safe_serialization=True" in fails(3, tmp_path / "adapter")
