"""int8 and int4: the graphs and weights that are written, rows that stay apart, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import famexport as fx
from famexport.config import FamConfig, preset
from famexport.errors import IncompatibleError, NumericError, ParityError, UsageError
from famexport.export import quantize as quantize_module
from famexport.export.passes import MS, serialize
from famexport.export.quantize import HEADS, INT4_BLOCK
from famexport.runtime import ort as ort_module
from famexport.runtime.ort import signed_products_overflow
from famexport.tensorfile import read_header
from tests.conftest import tiny_tokenizer

PRECISIONS = ("int8", "int4")
# One layer more than are traced, so that they are stamped; heads untied
CONFIG = preset("tiny", num_hidden_layers=3, vocab_size=64, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Any:
    """Bundles of one checkpoint, by precision and options."""
    folder, kept = tmp_path_factory.mktemp("quantize"), {}

    def get(precision: str, config: FamConfig = CONFIG, **options: Any) -> fx.Bundle:
        key = repr((precision, config, sorted(options.items())))
        if key not in kept:
            checkpoint = folder / f"checkpoint-{len(kept)}"
            make_checkpoint(checkpoint, config, tokenizer=tiny_tokenizer() if options.pop("text", False) else None)
            options = {"parity_blocks": 2, "tolerance": 0.9 if precision in PRECISIONS else None, **options}
            kept[key] = fx.export_bundle(checkpoint, folder / f"bundle-{len(kept)}", precision=precision, **options)
        return kept[key]

    return get


def _logits(bundle: fx.Bundle, ids: np.ndarray) -> np.ndarray:
    with fx.load(bundle, "ort-cpu") as session, session.stream() as stream:
        return np.concatenate([rows.copy() for rows in stream.feed([ids])], 1)


def _ids(config: FamConfig, blocks: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(5).integers(0, config.vocab_size, (batch, blocks * config.block_size))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_all_graphs_share_one_quantised_copy(made: Any, precision: str, tied: bool) -> None:
    config = preset("tiny", **{**CONFIG_CHANGES, "tie_word_embeddings": tied})
    bundle, plain = made(precision, config, graphs="all"), made("fp32", config, graphs="all")
    header, floats = read_header(bundle.path / "weights.safetensors"), read_header(plain.path / "weights.safetensors")
    products = {n for n, e in floats.items() if n.endswith("_proj.weight") or n == HEADS[tied]}
    for name, entry in floats.items():
        assert (name in header) == (name not in products or (tied and name == HEADS[1])), name
        if name in products:
            n, k = entry.shape
            if precision == "int8" or name in HEADS:
                assert header[f"{name}.int8"].shape == (k, n)
                assert header[f"{name}.int8"].dtype == "int8"
                assert f"{name}.int4" not in header
            else:
                assert header[f"{name}.int4"].nbytes == n * k // 2
                assert header[f"{name}.scale"].shape == (n, k // INT4_BLOCK)
    kinds = {}
    for graph in bundle.contract.graph_names:
        model = ir.load(bundle.path / f"{graph}.onnx")
        assert model.metadata_props["famexport.precision"] == precision
        kinds[graph] = {node.op_type for node in model.graph if node.domain == MS}
        for node in model.graph:
            if node.op_type == "MatMul":
                assert not any(v in model.graph.initializers.values() for v in node.inputs)
    wanted = {"MatMulIntegerToFloat", "RotaryEmbedding"} | ({"MatMulNBits"} if precision == "int4" else set())
    assert kinds["block_step"] == kinds["append_step"] == wanted
    assert bundle.manifest.precision == precision
    assert {spec.dtype for spec in bundle.contract.all_states} == {"float32", "int64"}
    assert bundle.manifest.cost["weight_bytes_read"] < 0.6 * plain.manifest.cost["weight_bytes_read"]


CONFIG_CHANGES = {"num_hidden_layers": 3, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


def test_quantisers_lose_what_their_steps_say() -> None:
    weight = np.random.default_rng(0).standard_normal((70, 64)).astype(np.float32)
    weight[3] = 0
    rounded, scale = quantize_module._int8(weight)
    assert np.abs(rounded.T.astype(np.float32) * scale[:, None] - weight).max() <= scale.max() * 0.5001
    packed, scales, zeros = quantize_module._int4(weight)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(70, 2, INT4_BLOCK).astype(np.float32)
    middle = np.stack([zeros & 15, zeros >> 4], -1).reshape(70, 2, 1)
    error = np.abs((values - middle) * scales[..., None] - weight.reshape(70, 2, INT4_BLOCK))
    assert (error <= np.abs(scales[..., None]) * 1.01 + 1e-6).all()


def test_a_row_of_zeros_is_zeros() -> None:
    """That of a word which is in no text. Without a scale it would be 0 / 0, rounded to anything."""
    weight = np.random.default_rng(0).standard_normal((70, 64)).astype(np.float32)
    weight[3] = 0
    with np.errstate(all="raise"):
        rounded, scale = quantize_module._int8(weight)
    assert (scale > 0).all()
    assert not rounded[:, 3].any()


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.2), ("int4", 0.9)])
def test_closed_loop_stays_near_float32(made: Any, precision: str, limit: float) -> None:
    ids = _ids(CONFIG, 12)
    got, wanted = (_logits(made(p, graphs="all", chunks=(1, 3)), ids) for p in (precision, "fp32"))
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < limit  # not nothing either: it is quantised
    assert (got.argmax(-1) == wanted.argmax(-1)).mean() > (0.8 if precision == "int8" else 0.4)  # chance is 0.02


@pytest.mark.parametrize(
    ("precision", "width", "limit"), [("int8", 2, 1e-3), ("int4", 2, 1e-3), ("int8", 1, 0.1), ("int4", 1, 0.02)]
)
def test_chunks_give_what_blocks_give(made: Any, precision: str, width: int, limit: float) -> None:
    """A row has its own scales, so its neighbours do not count. A single row is rounded otherwise."""
    bundle, ids = made(precision, graphs="all", chunks=(width,)), _ids(CONFIG, 3)
    whole = _logits(bundle, ids)
    with fx.load(bundle, "ort-cpu") as session, session.stream() as stream:
        parts = np.concatenate([stream.add(ids[:, i : i + width]).copy() for i in range(0, ids.shape[1], width)], 1)
    error = np.linalg.norm(parts - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
    assert np.median(error) < limit  # where sums round differently, an integer may be the next one
    assert error.max() < max(0.1, 2 * limit)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_a_batch_do_not_see_each_other(made: Any, precision: str) -> None:
    bundle = made(precision, batch=2, inputs="inputs_embeds")
    spec = bundle.contract.inputs[0]
    fed = np.random.default_rng(1).standard_normal(spec.sized(2)).astype(np.float32)
    loud, broken = fed.copy(), fed.copy()
    loud[1] *= 1000
    broken[1, 2, 3] = np.nan
    results = []
    with fx.load(bundle, "ort-cpu") as session:
        for one in (fed, loud, broken):
            loop = session.backend.open(None)
            out = np.empty(bundle.contract.outputs[0].sized(2), np.float32)
            loop.advance(one, out)
            loop.commit()
            results.append(out)
    np.testing.assert_array_equal(results[1][0], results[0][0])
    np.testing.assert_array_equal(results[2][0], results[0][0])
    assert np.isnan(results[2][1, 2]).all()


def test_other_backends_and_engines_refuse(made: Any) -> None:
    bundle = made("int8", graphs="all", chunks=(1, 3))
    for backend in ("torch", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(IncompatibleError, match=f"{backend} does not run; use ort-cpu, or export with"):
            fx.load(bundle, backend)
    with fx.load(bundle) as session:
        assert session.info()["backend"] == "ort-cpu"
        assert session.info()["precision"] == "int8"
    from famexport.engine.build import build_engines

    with pytest.raises(IncompatibleError, match="no engine can be built"):
        build_engines(bundle, "rtx-4090", engine="tensorrt-rtx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "opset": 23}, "int8 needs opset 20, got 23"),
        ({"precision": "int4", "opset": 18}, "int4 needs opset 20, got 18"),
        ({"precision": "bf16", "max_loss_increase": 0.1}, "for precision int8 or int4, got bf16"),
        ({"precision": "fp32", "quality_text": "README.md"}, "for precision int8 or int4, got fp32"),
        ({"precision": "int8", "max_loss_increase": float("nan")}, "positive, finite"),
        ({"precision": "int8", "quality_text": "no-such-file"}, "no such file"),
        ({"precision": "int2"}, "precision must be one of"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], message: str, make_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    with pytest.raises(UsageError, match=message):
        fx.export_bundle(checkpoint, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_a_module_is_not_quantised(tmp_path: Path) -> None:
    from famexport.model import FamModel

    with pytest.raises(UsageError, match="a module is exported as its own contract says"):
        fx.export_bundle(FamModel(CONFIG), tmp_path / "bundle", precision="int8")


def test_manifest_has_the_quality(made: Any, make_checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a stone falls into the water and the ring grows " * 30)
    bundle = made("int8", text=True, quality_text=tmp_path / "text.txt", max_loss_increase=0.5)
    quality = bundle.manifest.parity["quality"]
    assert quality["text"] == "text.txt"
    assert quality["tokens"] == 300 // CONFIG.block_size * CONFIG.block_size
    assert quality["max_loss_increase"] == 0.5
    assert quality["loss"] - quality["reference_loss"] == pytest.approx(quality["loss_increase"], abs=1e-9)
    assert 0.6 < quality["argmax_agreement"] <= 1
    with_none = made("int8", graphs="all", chunks=(1, 3)).manifest.parity["quality"]
    assert with_none == {"unmeasured": "the checkpoint has no tokenizer"}


@pytest.mark.parametrize(("tolerance", "error"), [(None, ParityError), (1e9, NumericError)])
def test_damaging_quantisation_publishes_nothing(
    tolerance: float | None, error: type[Exception], make_checkpoint: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """By the roll-out where it is damage beyond rounding, and by the text where that is let through."""
    real = quantize_module._int8

    def damaged(weight: np.ndarray) -> tuple[np.ndarray, ...]:
        rounded, scale = real(weight)
        return rounded, -30 * scale

    monkeypatch.setattr(quantize_module, "_int8", damaged)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG, tokenizer=tiny_tokenizer())
    with pytest.raises(error, match="nothing was published"):
        fx.export_bundle(checkpoint, tmp_path / "bundle", precision="int8", parity_blocks=2, tolerance=tolerance)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_x86_without_vnni_is_told_to_be_exact(
    made: Any, monkeypatch: pytest.MonkeyPatch, precision: str, overflows: bool
) -> None:
    """Where sums of products overflow, and only there, since the conversion makes other machines slower."""
    monkeypatch.setattr(ort_module, "signed_products_overflow", lambda: overflows)
    with fx.load(made(precision, graphs="all"), "ort-cpu") as session:
        for engine in session.backend.sessions.values():
            options = engine.get_session_options()
            try:
                entry = options.get_session_config_entry("session.x64quantprecision")
            except RuntimeError:  # not set
                entry = None
            assert (entry == "1") == (overflows and precision != "fp32")


def test_both_ways_to_load_weights_give_the_same(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if signed_products_overflow():
        pytest.skip("only the conversion is right on this CPU")
    bundle, ids, found = made("int8", graphs="all"), _ids(CONFIG, 4), []
    for converted in (True, False):
        monkeypatch.setattr(ort_module, "signed_products_overflow", lambda converted=converted: converted)
        found.append(_logits(bundle, ids))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def signed_product() -> bytes:
    """``signed_product.onnx``: rows uint8 [n, 96] around 128, times a weight int8 [96, 48]."""
    rows = ir.Value(name="rows", shape=ir.Shape(("n", 96)), type=ir.TensorType(ir.DataType.UINT8))
    constants = {
        "weight": ort_module.signed_weight().astype(np.int8),
        "one": np.float32(1),
        "scale": np.ones(48, np.float32),
        "middle": np.uint8(128),
        "weight_zero": np.int8(0),
    }
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()]
    node = ir.node("MatMulIntegerToFloat", [rows, *values], domain=MS, name="product")
    (sums,) = node.outputs
    sums.name, sums.shape, sums.type = "sums", ir.Shape(("n", 48)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [rows], [sums], nodes=[node], initializers=values, opset_imports={"": 20, MS: 1}, name="signed_product"
    )
    return serialize(ir.Model(graph, ir_version=9))


def test_the_product_that_tells_whether_sums_overflow_is_made_here() -> None:
    assert ort_module._SIGNED_PRODUCT.read_bytes() == signed_product()


def saturated(rows: np.ndarray) -> np.ndarray:
    """What AVX2 makes of them: unsigned rows times signed weights in pairs, whose sum has 16 bits."""
    weight = ort_module.signed_weight()
    pairs = [rows[:, i::2].astype(np.int64)[:, :, None] * weight[None, i::2] for i in (0, 1)]
    sums = np.clip(pairs[0] + pairs[1], -(2**15), 2**15 - 1).sum(1)
    return (sums - 128 * weight.sum(0)).astype(np.float32)


@pytest.mark.parametrize(
    ("plain", "converted", "says"),
    [
        ("right", "right", False),
        ("saturated", "right", True),
        ("saturated", "saturated", "gives wrong int8 products on this CPU; upgrade it"),
        ("many", "many", "gives wrong int8 products on this CPU; upgrade it"),
        ("raises", "right", "cannot multiply int8: no such kernel; upgrade it"),
    ],
)
def test_cpus_that_cannot_add(monkeypatch: pytest.MonkeyPatch, plain: str, converted: str, says: bool | str) -> None:
    """``many``: a kernel for 32 rows and more is wrong, as one for AMX was (microsoft/onnxruntime#27671)."""

    class Session:
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            self.kind = converted if options.get_session_config_entry("session.x64quantprecision") == "1" else plain

        def run(self, names: None, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
            rows = fed["rows"]
            right = ((rows.astype(np.int64) - 128) @ ort_module.signed_weight()).astype(np.float32)
            if self.kind == "raises":
                raise RuntimeError("no such kernel")
            if self.kind == "many" and len(rows) >= 32:
                right[-1, -1] += 1
            return [saturated(rows) if self.kind == "saturated" else right]

    fake = SimpleNamespace(SessionOptions=ort.SessionOptions, InferenceSession=Session, __version__="1.20.0")
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: fake)
    ask = signed_products_overflow.__wrapped__
    if isinstance(says, bool):
        assert ask() is says
    else:
        with pytest.raises(IncompatibleError, match=says):
            ask()
