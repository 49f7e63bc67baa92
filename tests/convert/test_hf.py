from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from famexport.checkpoint import (
    EMBED_WEIGHT,
    FAM_WEIGHT,
    init_checkpoint,
    open_checkpoint,
    parameter_shapes,
    write_checkpoint,
)
from famexport.config import preset
from famexport.convert import convert, hf
from famexport.errors import CheckpointError, UsageError

pytest.importorskip("transformers")
NO_FAM = {"block_size": 8, "memory_segments": 8, "fam_length": 0}
IDS = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(family, tied, tmp_path, make_model, logits_of):
    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")  # several shards
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    made = convert(tmp_path / "hf", tmp_path / "out", **NO_FAM)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made, IDS), model(IDS).logits, atol=2e-5, rtol=1e-4)
    checkpoint = open_checkpoint(made)
    assert checkpoint.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in checkpoint.tensors) is not tied


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_checkpoint_back(family, tmp_path, make_model):
    import transformers

    model = make_model(family)
    model.save_pretrained(tmp_path / "hf")
    made = convert(tmp_path / "hf", tmp_path / "out", **NO_FAM)
    again = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_llama3_rope_scaling(tmp_path, make_model, logits_of):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_model("llama", rope_parameters=rope | {"original_max_position_embeddings": 32})
    model.save_pretrained(tmp_path / "hf")
    made = convert(tmp_path / "hf", tmp_path / "out", **NO_FAM)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made, IDS), model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_older_generation_of_config(tmp_path, make_model, logits_of):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    data = json.loads(file.read_text())
    rope = data.pop("rope_parameters")
    file.write_text(
        json.dumps(data | {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"})
    )
    made = convert(tmp_path / "hf", tmp_path / "out", **NO_FAM)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made, IDS), model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_dtypes_are_kept_or_changed(tmp_path, make_model):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, tmp_path / "hf/model.safetensors")
    kept = open_checkpoint(convert(tmp_path / "hf", tmp_path / "kept", block_size=16))
    assert kept.tensors["model.norm.weight"].dtype == "float32"
    assert kept.dtype == kept.tensors[FAM_WEIGHT].dtype == "bfloat16"
    for name, weight in weights.items():
        assert torch.equal(kept.tensor(name), weight)
    changed = open_checkpoint(convert(tmp_path / "hf", tmp_path / "changed", dtype="float16", block_size=16))
    assert {t.dtype for t in changed.tensors.values()} == {"float16"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(changed.tensor(name), weights[name].half())
    with pytest.raises(UsageError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        convert(tmp_path / "hf", tmp_path / "x", dtype="int8")


def test_overflow_and_nan_are_refused(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    for value, dtype, named in ((1e6, "float16", "float16 cannot hold"), (float("inf"), None, "holds NaN or infinite")):
        weights["model.norm.weight"][3] = value
        save_file(weights, tmp_path / "hf/model.safetensors")
        with pytest.raises(CheckpointError, match=rf"model\.norm\.weight.*{named}"):
            convert(tmp_path / "hf", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_fam_settings(tmp_path):
    source = init_checkpoint(tmp_path / "a", preset("tiny"), seed=1)
    mark_trained(source)
    before = open_checkpoint(source)
    same = open_checkpoint(convert(source, tmp_path / "b"))
    assert same.config == before.config
    assert same.fam_trained
    assert (same.path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    options = {"block_size": 16, "memory_segments": 5, "fam_query_position": "previous", "fam_length": 4}
    other = open_checkpoint(convert(source, tmp_path / "c", **options))
    assert {key: getattr(other.config, key) for key in options} == options
    assert torch.equal(other.tensor(FAM_WEIGHT), before.tensor(FAM_WEIGHT))
    with pytest.raises(UsageError, match="embeddings of length 4, fam_length 8 was asked for; leave fam_length out"):
        convert(source, tmp_path / "d", fam_length=8)
    dropped = open_checkpoint(convert(source, tmp_path / "d", fam_length=0))
    assert FAM_WEIGHT not in dropped.tensors
    assert not dropped.fam_trained
    drop_weight(source, FAM_WEIGHT)
    sampled = open_checkpoint(convert(source, tmp_path / "e", fam_length=8))
    assert sampled.tensors[FAM_WEIGHT].shape == (8, 32)
    assert not sampled.fam_trained


def mark_trained(path: Path) -> None:
    data = json.loads((path / "config.json").read_text())
    data["fam"]["trained"] = True
    (path / "config.json").write_text(json.dumps(data))


def drop_weight(path: Path, name: str) -> None:
    weights = load_file(path / "model.safetensors")
    del weights[name]
    save_file(weights, path / "model.safetensors")


def test_defaults_where_nothing_is_said(tmp_path, make_model):
    make_model("llama", vocab_size=10).save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(convert(tmp_path / "hf", tmp_path / "out"))
    config = checkpoint.config
    assert (config.block_size, config.memory_segments, config.fam_length) == (128, 3, 16)
    table = checkpoint.tensor("model.embed_tokens.weight")  # fewer rows than F: some are taken twice
    assert all((table == row).all(1).any() for row in checkpoint.tensor(FAM_WEIGHT))


def test_a_stray_head_of_a_tied_model_is_left_out(tmp_path, make_model):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    save_file(weights | {"lm_head.weight": torch.ones(96, 64)}, tmp_path / "hf/model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(convert(tmp_path / "hf", tmp_path / "out")).tensors


def test_other_copies_of_the_weights_are_not_read(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "hf")
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "hf/consolidated.safetensors")
    open_checkpoint(convert(tmp_path / "hf", tmp_path / "out"))


def test_pickled_weights_are_refused(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_damaged_shards(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    index = tmp_path / "hf/model.safetensors.index.json"
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{shards[1].name}.*truncated"):
        convert(tmp_path / "hf", tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name}' is missing"):
        convert(tmp_path / "hf", tmp_path / "out")
    shards[1].write_bytes(whole)
    text = index.read_text()
    for bad in ("../x.safetensors", "/etc/passwd", "", "a/b"):
        index.write_text(text.replace(shards[0].name, bad))
        with pytest.raises(CheckpointError, match="is not a file name"):
            convert(tmp_path / "hf", tmp_path / "out")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        convert(tmp_path / "hf", tmp_path / "out")


def tokenizer_json(size: int) -> str:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).to_str()


def test_tokenizer_files_are_checked_and_copied(tmp_path, make_model):
    source = tmp_path / "hf"
    make_model("llama").save_pretrained(source)
    (source / "tokenizer.json").write_text(tokenizer_json(96))
    (source / "tokenizer_config.json").write_text('{"eos_token": "w1"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not ours")
    made = convert(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert not (made / "notes.txt").exists()
    (source / "tokenizer.json").write_text(tokenizer_json(97))
    with pytest.raises(
        CheckpointError, match="token ids up to 96, the model's vocabulary has 96: this is another model"
    ):
        convert(source, tmp_path / "out2")
    (source / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="is not a tokenizer.json"):
        convert(source, tmp_path / "out2")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.warns(UserWarning, match="tokenizer.model but no tokenizer.json"):
        convert(source, tmp_path / "out2")


def test_tokenizer_files_have_a_limit(tmp_path, make_model, monkeypatch):
    """They are read whole: the largest that is taken, and a byte more."""
    source, text = tmp_path / "hf", tokenizer_json(96)
    make_model("llama").save_pretrained(source)
    (source / "tokenizer.json").write_text(text)
    monkeypatch.setattr(hf, "MAX_TOKENIZER_BYTES", len(text))
    convert(source, tmp_path / "out")
    (source / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.json has {len(text) + 1} bytes, expected at most {len(text)}"
    ):
        convert(source, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# Peaks from /proc: ru_maxrss begins with the size of the process that started this one.
MEASURE = """
import sys, torch
torch.set_num_threads(1)
from famexport.convert import convert
small, large, out = sys.argv[1:]

def memory_mb(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))

for dtype in ("float32", "float16"):
    convert(small, out, dtype=dtype)
    before = memory_mb("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    convert(large, out, dtype=dtype)
    print(memory_mb("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_that_of_two_tensors(tmp_path):
    small = preset("tiny", fam_length=0)
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "num_hidden_layers": 3}
    large = replace(small, vocab_size=8192, hidden_size=1024, intermediate_size=4096, **sizes)
    for name, config in (("small", small), ("large", large)):
        shapes = parameter_shapes(config)
        write_checkpoint(
            tmp_path / name, config, {EMBED_WEIGHT: "float32"}, lambda n, s=shapes: torch.ones(s[n]), fam_trained=False
        )
        data = json.loads((tmp_path / name / "config.json").read_text())
        del data["fam"]
        (tmp_path / name / "config.json").write_text(json.dumps(data))
    assert (tmp_path / "large/model.safetensors").stat().st_size > 200e6
    largest_mb = 8192 * 1024 * 4 / 2**20
    arguments = [str(tmp_path / name) for name in ("small", "large", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "large")
    shutil.rmtree(tmp_path / "out")
    growth_mb = [float(line) for line in done.stdout.split()]
    assert len(growth_mb) == 2
    assert largest_mb / 2 < min(growth_mb)  # or it was not measured
    assert max(growth_mb) < 2.25 * largest_mb, f"{growth_mb} MB for tensors of at most {largest_mb} MB"
