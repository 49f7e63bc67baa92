from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from famexport.checkpoint import (
    EMBED_WEIGHT,
    FAM_WEIGHT,
    init_checkpoint,
    is_checkpoint,
    open_checkpoint,
    parameter_shapes,
    sampled_fam_embeddings,
    tensor_files,
    write_checkpoint,
)
from famexport.config import PRESETS, Llama3Scaling, preset
from famexport.errors import CheckpointError, ConfigError, FamExportError, UsageError
from famexport.model import FamModel

TINY = preset("tiny")
CONFIGS = {
    "tiny": TINY,
    "no fam": replace(TINY, fam_length=0),
    "tied": replace(TINY, tie_word_embeddings=True),
    "biases": replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral": replace(TINY, model_type="mistral", num_key_value_heads=4),
    "qwen2": replace(TINY, model_type="qwen2", qkv_bias=True),
    "qwen3": replace(TINY, model_type="qwen3", qk_norm=True, head_dim=16),
    "llama3": replace(TINY, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "layernorm": replace(TINY, model_type="fam", norm="layernorm", gated_mlp=False, activation="gelu", qk_norm=True),
    "all biases": replace(TINY, model_type="fam", gated_mlp=False, qkv_bias=True, mlp_bias=True, norm="layernorm"),
}


@pytest.fixture
def made(tmp_path) -> Path:
    return init_checkpoint(tmp_path / "ck", TINY)


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove weights."""
    weights = load_file(path / "model.safetensors") | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    config = CONFIGS[name]
    checkpoint = open_checkpoint(init_checkpoint(tmp_path / "ck", config, dtype="bfloat16"))
    assert checkpoint.config == config
    assert not checkpoint.fam_trained
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.tokenizer is None
    expected = load_file(tmp_path / "ck/model.safetensors")
    assert set(checkpoint.tensors) == set(expected) == set(parameter_shapes(config))
    for tensor in checkpoint.tensors:
        assert torch.equal(checkpoint.tensor(tensor), expected[tensor])
    FamModel(config).load_state_dict({t: checkpoint.tensor(t) for t in checkpoint.tensors}, strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_counts_the_models_weights(name):
    config = CONFIGS[name]
    assert config.parameters == sum(p.numel() for p in FamModel(config).parameters())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_shapes_of_large_models_cost_no_memory(name):
    config = PRESETS[name]
    shapes = parameter_shapes(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.parameters


def test_sizes_beyond_64_bits_are_refused():
    with pytest.raises(ConfigError, match="sizes are too large"):
        parameter_shapes(replace(TINY, hidden_size=2**40, intermediate_size=2**40))
    with pytest.raises(ConfigError, match="sizes are too large"):
        parameter_shapes(replace(TINY, vocab_size=2**70))


def test_init_gives_the_same_bytes_twice(tmp_path):
    files = [init_checkpoint(tmp_path / str(i), TINY, seed=seed) for i, seed in enumerate((0, 0, 1))]
    digests = [hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() for path in files]
    assert digests[0] == digests[1] != digests[2]
    assert (files[0] / "config.json").read_bytes() == (files[1] / "config.json").read_bytes()


def test_init_weights_do_not_depend_on_other_weights(tmp_path):
    small, large = (init_checkpoint(tmp_path / str(n), replace(TINY, num_hidden_layers=n)) for n in (2, 3))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(open_checkpoint(small).tensor(name), open_checkpoint(large).tensor(name))
    weights = load_file(small / "model.safetensors")
    assert not torch.equal(weights[name], weights["model.layers.0.self_attn.q_proj.weight"])
    assert weights[name].std() == pytest.approx(0.02, rel=0.1)
    assert weights["model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))


def test_sampled_embeddings_are_rows_of_the_table():
    table = torch.arange(20.0).reshape(10, 2)
    rows = sampled_fam_embeddings(table, 10, seed=1)
    assert torch.equal(rows.sort(0).values, table)
    assert torch.equal(rows, sampled_fam_embeddings(table, 10, seed=1))
    assert not torch.equal(rows, sampled_fam_embeddings(table, 10, seed=2))
    assert sampled_fam_embeddings(table, 25).shape == (25, 2)
    rows.zero_()
    assert table.sum() == 190  # a copy


def test_weights_that_do_not_fit_are_named_all_at_once(made):
    missing, wrong, whole = (
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )
    change(made, {missing: None, wrong: torch.ones(3, 2), "odd.weight": torch.ones(1), whole: torch.ones(64, 32).int()})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(made)
    for named in (
        "4 problems",
        f"missing {missing}",
        f"{wrong} has shape [3, 2], expected [64, 32]",
        "unexpected 'odd.weight'",
        f"{whole} is int32, expected float32, float16 or bfloat16",
    ):
        assert named in str(caught.value)


def test_names_that_are_a_terminals_commands_are_shown_as_text(made):
    change(made, {"\x1b]0;owned\x07": torch.ones(1), "long" * 100: torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(made)
    said = str(caught.value)
    assert r"unexpected '\x1b]0;owned\x07'" in said
    assert said.isprintable()
    assert "long" * 24 in said
    assert "long" * 26 not in said


def test_a_file_that_the_safetensors_package_refuses(made):
    """``-0`` is a whole number to Python and none to the package."""
    file = made / "model.safetensors"
    checkpoint, whole = open_checkpoint(made), file.read_bytes()
    file.write_bytes(whole.replace(b"[0,", b"[-0,", 1).replace(b"  ", b" ", 1))
    assert open_checkpoint(made).tensors == checkpoint.tensors
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*; copy it again"):
        checkpoint.tensor(EMBED_WEIGHT)


def test_long_lists_of_problems_are_cut(made):
    change(made, {f"odd.{i}": torch.ones(1) for i in range(50)})
    with pytest.raises(CheckpointError, match="21 problems: .*and 30 more"):
        open_checkpoint(made)


def test_weights_that_do_not_matter_are_taken(tmp_path):
    path = init_checkpoint(tmp_path / "ck", replace(TINY, tie_word_embeddings=True))
    change(path, {"lm_head.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert set(open_checkpoint(path).tensors) == set(parameter_shapes(replace(TINY, tie_word_embeddings=True)))


def test_fam_embeddings_are_part_of_a_checkpoint(made):
    change(made, {FAM_WEIGHT: None})
    with pytest.raises(CheckpointError, match=f"missing {re.escape(FAM_WEIGHT)}"):
        open_checkpoint(made)


def test_a_weight_in_two_files(made):
    weights = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    save_file(weights, made / "a.safetensors")
    save_file({EMBED_WEIGHT: weights[EMBED_WEIGHT]}, made / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"weight' is in both a\.safetensors and b\.safetensors"):
        open_checkpoint(made)
    (made / "b.safetensors").unlink()
    assert tensor_files(made)[0][EMBED_WEIGHT].name == "a.safetensors"


def test_truncated_weights(made):
    file = made / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated|damaged"):
            open_checkpoint(made)
    file.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="truncated or overwritten"):
        open_checkpoint(made)


def test_bit_flips_in_the_header_give_typed_errors_or_a_checkpoint(made):
    file = made / "model.safetensors"
    whole = file.read_bytes()
    header, rng, refused = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            open_checkpoint(made)
        except FamExportError:
            refused += 1
    assert refused > 100


def test_config_files_that_are_not_ones(made):
    file = made / "config.json"
    good = json.loads(file.read_text())
    cases = {
        b"{": "is not valid JSON",
        b"\xff\xfe": "is not valid JSON",
        b"[" * 100_000: "is not valid JSON",
        b"[]": "holds list, expected an object",
        b" " * (2**20 + 1): "expected at most 1048576",
        json.dumps(
            {k: v for k, v in good.items() if k != "fam"}
        ).encode(): "make it one of famexport's with: famexport",
    }
    for text, named in cases.items():
        file.write_bytes(text)
        with pytest.raises(CheckpointError, match=named):
            open_checkpoint(made)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(made)


def test_no_weights(made):
    (made / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file$"):
        open_checkpoint(made)
    (made / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights are not read: save the model again"):
        open_checkpoint(made)
    with pytest.raises(UsageError, match="no such path"):
        open_checkpoint(made / "none")


def test_a_writer_that_fails_leaves_the_old_checkpoint(made):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    shapes, written = parameter_shapes(TINY), []

    def load(name: str) -> torch.Tensor:
        written.append(name)
        if len(written) > 5:
            raise RuntimeError("stop")
        return torch.zeros(shapes[name])

    with pytest.raises(RuntimeError, match="stop"):
        write_checkpoint(made, TINY, {EMBED_WEIGHT: "float32"}, load, fam_trained=True)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert [path.name for path in made.parent.iterdir()] == ["ck"]


def test_written_as_asked(tmp_path):
    shapes = parameter_shapes(TINY)
    dtypes = {EMBED_WEIGHT: "float16", "model.norm.weight": "float32"}
    path = write_checkpoint(
        tmp_path / "ck",
        TINY,
        dtypes,
        lambda name: torch.full(shapes[name], 1.5, dtype=torch.float64),
        fam_trained=True,
        extra={"tokenizer.json": b"{}"},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.fam_trained
    assert checkpoint.tokenizer == path / "tokenizer.json"
    found = {name: entry.dtype for name, entry in checkpoint.tensors.items()}
    assert found == {name: dtypes.get(name, "float16") for name in shapes}
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.full((32,), 1.5))
    with pytest.raises(CheckpointError, match="a llama checkpoint cannot have qk_norm=True"):
        write_checkpoint(tmp_path / "x", replace(TINY, qk_norm=True), dtypes, torch.ones, fam_trained=False)


def test_what_is_a_checkpoint(made, tmp_path):
    assert is_checkpoint(made)
    data = json.loads((made / "config.json").read_text())
    del data["fam"]
    (made / "config.json").write_text(json.dumps(data))
    assert not is_checkpoint(made)  # somebody's Hugging Face model is not ours to replace
    (made / "config.json").write_text("{")
    assert not is_checkpoint(made)
    assert not is_checkpoint(tmp_path / "none")
    assert not is_checkpoint(made / "config.json")
