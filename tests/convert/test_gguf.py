from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from famexport.checkpoint import open_checkpoint
from famexport.convert import convert
from famexport.convert.gguf_file import read_gguf
from famexport.errors import CheckpointError, FamExportError, UnsupportedModelError

pytest.importorskip("gguf")
pytest.importorskip("transformers")
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NO_FAM = {"block_size": 8, "memory_segments": 8, "fam_length": 0}
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json was written")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_are_those_of_the_original(family, tmp_path, make_model, write_gguf, logits_of):
    model = make_model(family, tie_word_embeddings=family == "qwen2")
    path = write_gguf(tmp_path / "m.gguf", model, FAMILIES[family])
    made = convert(path, tmp_path / "out", **NO_FAM)
    checkpoint, expected = open_checkpoint(made), model.state_dict()
    assert checkpoint.config.model_type == FAMILIES[family]
    assert checkpoint.config.tie_word_embeddings is (family == "qwen2")
    assert (checkpoint.config.norm_eps, checkpoint.config.rope_theta) == (1e-5, 5000.0)
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.tensor(name), expected[name]), name
    ids = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made, ids), model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_are_those_that_transformers_reads(family, kind, tmp_path, make_model, write_gguf, monkeypatch):
    import transformers

    # It asks for accelerate before it reads a GGUF file, and needs it only to spread a model over devices.
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_: True)
    options = {"head_dim": 128} if family == "qwen3" else {}  # theirs does not read attention.key_length
    write_gguf(tmp_path / "m.gguf", make_model(family, **options), family, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    checkpoint = open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32", **NO_FAM))
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.tensor(name), theirs.state_dict()[name]), name


def test_dtypes(tmp_path, make_model, write_gguf, monkeypatch):
    import gguf

    from famexport.convert import gguf as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 64 * 4)  # seven rows at a time, so that 96 rows end in a part
    model = make_model("qwen3")
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    for kind, dtype in {"Q4_1": "float16", "Q8_0": "float16", "F16": "float16", "BF16": "bfloat16"}.items():
        path = write_gguf(tmp_path / f"{kind}.gguf", model, "qwen3", kind)
        checkpoint = open_checkpoint(convert(path, tmp_path / kind, **NO_FAM))
        assert checkpoint.dtype == dtype
        assert checkpoint.tensors["model.norm.weight"].dtype == "float32"
        quantisation = gguf.GGMLQuantizationType[kind]
        expected = gguf.dequantize(gguf.quantize(original.numpy(), quantisation), quantisation)
        got = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
        assert torch.equal(got, torch.from_numpy(expected).to(got.dtype))
        checkpoint = open_checkpoint(convert(path, tmp_path / kind, dtype="float32", **NO_FAM))
        assert {t.dtype for t in checkpoint.tensors.values()} == {"float32"}
        assert torch.equal(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"), torch.from_numpy(expected))


def test_llama_with_biases(tmp_path, make_model, write_gguf, logits_of):
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    made = convert(write_gguf(tmp_path / "m.gguf", model, "llama"), tmp_path / "out", **NO_FAM)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made, ids), model(ids).logits, atol=2e-5, rtol=1e-4)


def test_biases_no_family_has_make_a_fam_checkpoint(tmp_path, make_model, write_gguf):
    model = make_model("llama")
    shapes = {"attn_q": 64, "attn_k": 32, "attn_v": 32}
    biases = {f"blk.{i}.{part}.bias": np.full(n, 0.5, np.float32) for i in (0, 1) for part, n in shapes.items()}
    made = convert(write_gguf(tmp_path / "m.gguf", model, "llama", tensors=biases), tmp_path / "out")
    config = open_checkpoint(made).config
    assert (config.model_type, config.qkv_bias, config.out_bias) == ("fam", True, False)


def test_fam_embeddings_are_sampled_rows(tmp_path, make_model, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "llama")
    checkpoint = open_checkpoint(convert(path, tmp_path / "a", block_size=8, fam_length=4, seed=3))
    rows = checkpoint.tensor("model.fam_embeddings.weight")
    table = checkpoint.tensor("model.embed_tokens.weight")
    assert rows.shape == (4, 64)
    assert not checkpoint.fam_trained
    assert all((table == row).all(1).any() for row in rows)
    again = convert(path, tmp_path / "b", block_size=8, fam_length=4, seed=3)
    other = convert(path, tmp_path / "c", block_size=8, fam_length=4, seed=4)
    files = [(p / "model.safetensors").read_bytes() for p in (checkpoint.path, again, other)]
    assert files[0] == files[1] != files[2]


def test_header_equals_the_gguf_packages(tmp_path, make_model, write_gguf):
    import gguf

    def meta(writer):
        writer.add_string("a.text", "Grüße")
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_array("a.names", ["x", "", "ü"])
        writer.add_bool("a.bool", True)
        writer.add_float64("a.double", 0.1)
        writer.add_int8("a.small", -3)
        writer.add_uint64("a.large", 2**63)

    path = write_gguf(tmp_path / "m.gguf", make_model("qwen2"), "qwen2", "Q5_1", meta)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            got = ours.metadata[key]
            assert (got.tolist() if isinstance(got, np.ndarray) else got) == field.contents(), key
    assert len(ours.metadata) == len(theirs.fields) - 3
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        got = ours.tensors[tensor.name]
        assert (got.offset, got.nbytes, got.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
        assert got.shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rope.scaling.type", "linear", "rope.scaling.type='linear'"),
        ("rope.scaling.type", "yarn", "rope.scaling.type='yarn'"),
        ("rope.scaling.factor", 4.0, "rope.scaling.factor=4.0"),
        ("attention.sliding_window", 4096, "attention.sliding_window=4096"),
        ("expert_count", 8, "expert_count=8"),
        ("attention.value_length", 8, "attention.value_length=8"),
        ("rope.dimension_count", 8, "rope.dimension_count=8"),
        ("logit_scale", 0.5, "logit_scale=0.5"),
    ],
)
def test_unsupported_options_are_named(key, value, named, tmp_path, make_model, write_gguf):
    def meta(writer):
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"llama.{key}", value)

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "llama", meta=meta)
    with pytest.raises(UnsupportedModelError, match=named.replace("(", r"\(")):
        convert(path, tmp_path / "out", **NO_FAM)
    assert not (tmp_path / "out").exists()


def test_harmless_options_are_taken(tmp_path, make_model, write_gguf):
    def meta(writer):
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.expert_count", 0)
        writer.add_uint32("llama.rope.dimension_count", 16)
        writer.add_array("llama.feed_forward_length", [96, 96])

    path = write_gguf(tmp_path / "m.gguf", make_model("llama"), "llama", meta=meta, skip=("feed_forward_length",))
    assert open_checkpoint(convert(path, tmp_path / "out", **NO_FAM)).config.intermediate_size == 96


def test_unsupported_files_are_named(tmp_path, make_model, write_gguf):
    def per_layer(writer):
        writer.add_array("llama.attention.head_count_kv", [2, 4])

    model = make_model("llama")
    cases = {
        "gemma2": write_gguf(tmp_path / "a.gguf", model, "gemma2"),
        "rope_freqs.weight": write_gguf(
            tmp_path / "b.gguf", model, "llama", tensors={"rope_freqs.weight": np.ones(8, np.float32)}
        ),
        "head_count_kv' differs from layer to layer": write_gguf(
            tmp_path / "c.gguf", model, "llama", meta=per_layer, skip=("attention.head_count_kv",)
        ),
        "tensor type F64": write_gguf(tmp_path / "d.gguf", model, "llama", tensors={"x": np.ones(8)}),
    }
    for named, path in cases.items():
        with pytest.raises(UnsupportedModelError, match=named):
            convert(path, tmp_path / "out", **NO_FAM)


def test_missing_and_unexpected_are_named(tmp_path, make_model, write_gguf):
    model = make_model("llama")
    path = write_gguf(tmp_path / "a.gguf", model, "llama", skip=("embedding_length", "block_count"))
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length.*llama\.block_count"):
        convert(path, tmp_path / "out")
    path = write_gguf(tmp_path / "b.gguf", model, "llama", tensors={"blk.0.odd.weight": np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"unexpected 'blk\.0\.odd\.weight'"):
        convert(path, tmp_path / "out")
    path = write_gguf(tmp_path / "c.gguf", model, "qwen3")  # a llama's weights have neither norm
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.self_attn\.q_norm\.weight"):
        convert(path, tmp_path / "out")


def test_values_that_float16_cannot_hold(tmp_path, make_model, write_gguf):
    model = make_model("llama")
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    weight[0, 0] = 1e6
    path = write_gguf(tmp_path / "m.gguf", model, "llama")
    with pytest.raises(CheckpointError, match=r"1e\+06, which float16 cannot hold.*bfloat16"):
        convert(path, tmp_path / "out", dtype="float16")
    weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds NaN"):
        convert(write_gguf(tmp_path / "n.gguf", model, "llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _typed_or_fine(path: Path) -> bool:
    """Whether a damaged file is refused; anything but a typed error fails the test."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            convert(path, path.with_suffix(""), **NO_FAM)
        except FamExportError:
            return True
    return False


def test_truncated_and_garbage_files(tmp_path, make_model, write_gguf):
    whole = write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), "llama", "Q8_0").read_bytes()
    damaged = tmp_path / "d.gguf"
    rng = random.Random(0)
    cuts = [*range(0, 200, 3), *(rng.randrange(len(whole)) for _ in range(60)), len(whole) - 1]
    for cut in cuts:
        damaged.write_bytes(whole[:cut])
        assert _typed_or_fine(damaged), cut
    for text in (b"", b"GGUF", b"x" * 100, b"GGUF" + b"\xff" * 100, b"GGUF" + b"\0" * 100):
        damaged.write_bytes(text)
        assert _typed_or_fine(damaged), text


def test_bit_flips_in_the_header_give_typed_errors_or_a_checkpoint(tmp_path, make_model, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), "llama", "Q8_0")
    whole, header = path.read_bytes(), min(t.offset for t in read_gguf(path).tensors.values())
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        refused += _typed_or_fine(path)
    assert refused > 60


@pytest.mark.parametrize("item", [0, 4, 8, 9, 12])
def test_huge_counts_are_refused_at_once(item, tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    path = tmp_path / "m.gguf"
    key = struct.pack("<Q", 1) + b"k"
    for body in (
        key + struct.pack("<IIQ", 9, item, 2**60),  # an array of 2**60
        key + struct.pack("<IQ", 8, 2**62),  # a string of 2**62
        struct.pack("<Q", 2**64 - 1),  # a key
    ):
        path.write_bytes(head + body + b"\0" * 64)
        with pytest.raises(CheckpointError, match=r"get it again|not supported"):
            convert(path, tmp_path / "out")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + b"\0" * 64)
    with pytest.raises(CheckpointError):
        convert(path, tmp_path / "out")
