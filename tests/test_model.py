"""The model against a literal float64 reading of the specification, and the specification's own list of properties.

The model keeps its residual stream and its norms in float32 whatever the weights are. To compare in float64, where a
wrong term cannot hide behind rounding, the fixture ``exact`` makes ``Tensor.float`` mean float64 for one test; the code
under test is otherwise unchanged, and float32 as shipped has tests of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import famexport.model as model_module
import famexport.rotary as rotary_module
from famexport.config import FamConfig, Llama3Scaling
from famexport.model import FamModel, Layer, State
from tests.literal import LiteralStream, initial_fam, whole_sequence

EXACT = 1e-11  # absolute, float64, logits of order 1; measured: 4e-14
VOCAB = 29

BASE = FamConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,  # not hidden_size / heads
    block_size=4,
    memory_segments=2,
    fam_length=3,
)
# At head_dim 8 these put one wavelength in each of the rule's three ranges.
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)

CORNERS: dict[str, dict[str, Any]] = {
    "base": {},
    "no_fam": {"fam_length": 0},
    "no_memory": {"memory_segments": 0},
    "no_fam_no_memory": {"fam_length": 0, "memory_segments": 0},
    "one_segment": {"memory_segments": 1},
    "more_segments_than_blocks": {"memory_segments": 9},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "three_heads_per_kv_head": {"num_attention_heads": 6},
    "head_dim_is_width_over_heads": {"head_dim": 4},
    "head_dim_2": {"head_dim": 2},
    "one_layer": {"num_hidden_layers": 1},
    "three_layers": {"num_hidden_layers": 3},
    "qkv_bias": {"qkv_bias": True},
    "out_bias": {"out_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases_plain_mlp": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False},
    "qk_norm": {"qk_norm": True},
    "layernorm": {"norm": "layernorm"},
    "layernorm_qk_norm": {"norm": "layernorm", "qk_norm": True},
    "large_norm_eps": {"norm_eps": 0.3},
    "plain_mlp": {"gated_mlp": False},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu_plain_mlp": {"activation": "relu", "gated_mlp": False},
    "tied": {"tie_word_embeddings": True},
    "rope_theta": {"rope_theta": 300.0},
    "llama3": {"rope_scaling": LLAMA3},
    "query_previous": {"fam_query_position": "previous"},
    "block_of_one": {"block_size": 1, "fam_length": 1},
    "block_of_one_no_fam": {"block_size": 1, "fam_length": 0},
    "fam_fills_block": {"fam_length": 4},
    "fam_fills_block_query_previous": {"fam_length": 4, "fam_query_position": "previous"},
    "one_fam": {"fam_length": 1},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def corner(name: str) -> FamConfig:
    return replace(BASE, **CORNERS[name])


def build(config: FamConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> FamModel:
    """A model of random weights: norms and biases too, and queries and keys large enough for uneven attention."""
    rng = np.random.default_rng(seed)
    model = FamModel(config).to(dtype)
    for name, parameter in model.named_parameters():
        value = rng.standard_normal(tuple(parameter.shape))
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * value
        elif name.endswith("bias"):
            value = 0.3 * value
        elif not name.startswith("model.layers") and "lm_head" not in name:
            value = 0.8 * value  # embeddings
        else:
            value *= (1.5 if "q_proj" in name or "k_proj" in name else 0.9) / np.sqrt(value.shape[1])
        parameter.data.copy_(torch.from_numpy(value))
    return model.requires_grad_(False)


def weights_of(model: FamModel) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def fresh_state(model: FamModel, batch: int = 1) -> State:
    """Zeros of the contract's names and shapes, in the dtype of the model's weights (FAM at least float32)."""
    dtype = model.model.embed_tokens.weight.dtype
    state = {}
    for spec in model.contract(batch=batch).states:
        kind = torch.int64 if spec.name == "past_count" else dtype
        if spec.name.startswith("past_fam") and dtype != torch.float64:
            kind = torch.float32
        state[spec.name] = torch.zeros(spec.sized(batch), dtype=kind)
    return state


def random_tokens(config: FamConfig, blocks: int, batch: int = 1, seed: int = 1) -> Tensor:
    """[blocks, batch, T]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (blocks, batch, config.block_size), generator=generator)


def stream(model: FamModel, blocks: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Logits [blocks, b, T, V] and the last state."""
    state = fresh_state(model, blocks.shape[1]) if state is None else state
    out = []
    for block in blocks:
        logits, state = model.step(block, state)
        out.append(logits)
    return torch.stack(out), state


def running_state(model: FamModel, blocks: int = 4, batch: int = 1, seed: int = 7) -> State:
    return stream(model, random_tokens(model.config, blocks, batch, seed))[1]


def literal_state(literal: LiteralStream) -> dict[str, np.ndarray]:
    """What the state of one row must be after the blocks that ``literal`` has seen."""
    c, size = literal.config, literal.config.memory_segments * literal.config.block_size
    state: dict[str, np.ndarray] = {"past_count": np.array(min(literal.blocks, max(c.memory_segments, 1)))}
    for i in range(c.num_hidden_layers):
        if c.fam_length:
            state[f"past_fam_{i:02d}"] = literal.fam[i] if literal.blocks else np.zeros_like(literal.fam[i])
        if c.memory_segments:
            for which, name in enumerate(("key", "value")):
                slots = np.zeros((size, c.num_key_value_heads, c.head_dim))
                if literal.blocks:
                    seen = np.concatenate([block[which] for block in literal.past[i]])[-size:]
                    slots[size - len(seen) :] = seen
                state[f"past_{name}_{i:02d}"] = slots.transpose(1, 0, 2)
    return state


def gap(a: Any, b: Any) -> float:
    """Largest absolute difference."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0.0))


def same(a: State, b: State) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Against the literal implementation


@pytest.mark.parametrize("name", CORNERS)
def test_logits_and_state_are_the_literal_ones(exact: None, name: str) -> None:
    config = corner(name)
    model = build(config)
    weights, blocks = weights_of(model), random_tokens(config, 7, batch=3)
    state = fresh_state(model, 3)
    literals = [LiteralStream(config, weights) for _ in range(3)]
    for index, block in enumerate(blocks):
        # Row 1 and row 2 start again at different times, so that the rows' counts differ.
        for row in [r for r, when in ((1, 2), (2, 5)) if when == index]:
            literals[row] = LiteralStream(config, weights)
            for tensor in state.values():
                tensor[row] = 0
        logits, state = model.step(block, state)
        for row, literal in enumerate(literals):
            assert gap(logits[row], literal.block(block[row].numpy())) < EXACT
            for key, value in literal_state(literal).items():
                assert gap(state[key][row], value) < EXACT, key
    assert state.keys() == {spec.name for spec in model.contract().states}


def test_embeddings_can_take_the_place_of_tokens(exact: None) -> None:
    model = build(BASE)
    tokens = random_tokens(BASE, 1, batch=2)[0]
    state = running_state(model, batch=2)
    by_token, by_embedding = (model.step(x, state) for x in (tokens, model.model.embed_tokens(tokens)))
    assert torch.equal(by_token[0], by_embedding[0])
    assert same(by_token[1], by_embedding[1])

    literal, state = LiteralStream(BASE, weights_of(model)), fresh_state(model)
    for seed in range(3):
        x = torch.randn(1, BASE.block_size, BASE.hidden_size, generator=torch.Generator().manual_seed(seed)).double()
        logits, state = model.step(x, state)
        assert gap(logits[0], literal.block(x[0].numpy())) < EXACT


@pytest.mark.parametrize("name", ["base", "no_fam", "no_memory", "layernorm_qk_norm"])
def test_float32_as_shipped_is_near_the_literal_over_a_long_rollout(name: str) -> None:
    """Over 48 blocks and relative to the largest value; measured: 3e-6."""
    config = corner(name)
    model = build(config, dtype=torch.float32)
    literal, blocks = LiteralStream(config, weights_of(model)), random_tokens(config, 48)
    logits, state = stream(model, blocks)
    want = np.stack([literal.block(block[0].numpy()) for block in blocks])
    assert gap(logits[:, 0], want) < 1e-5 * np.abs(want).max()
    for i in range(config.num_hidden_layers if config.fam_length else 0):
        assert gap(state[f"past_fam_{i:02d}"][0], literal.fam[i]) < 1e-5 * np.abs(literal.fam[i]).max()


def test_random_weights_make_attention_uneven() -> None:
    """Otherwise the comparisons here would miss errors in positions and scores."""
    model = build(corner("mha"))
    layer = model.model.layers[0]
    q, k, _ = layer.self_attn.qkv(layer.input_layernorm(model.model.embed_tokens(random_tokens(BASE, 1)[0])))
    peaks = (q @ k.mT / BASE.head_dim**0.5).softmax(-1).amax(-1)
    assert 1.5 / BASE.block_size < peaks.mean() < 0.95


# The specification's list, "What a correct implementation shows"


def two_attentions_layer(
    self: Layer,
    x: Tensor,
    fam: Tensor,
    residual: Tensor,
    memory: tuple[Tensor, Tensor],
    rope: Any,
    mask: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A layer as the specification has it: tokens attend to [past blocks; FAM; tokens], FAM to [FAM; tokens], unmasked.

    Of ``mask`` only the filled slots are taken."""
    b, f, size = *fam.shape[:2], x.shape[1]
    q, k, v = self.self_attn.qkv(self.input_layernorm(torch.cat([fam, x], 1)))
    past = memory[0].shape[2]
    memory_table = [half[f : f + past] for half in rope.column]
    q, own = model_module.rotate(q, rope.query), model_module.rotate(k, rope.key)
    keys = torch.cat([model_module.rotate(memory[0], memory_table), own], 2)
    filled = mask[:, :, f:, f : f + past]
    triangle = torch.cat([torch.ones(size, f), torch.ones(size, size).tril()], 1).bool().expand(b, 1, size, -1)
    heads = model_module.attend(q[:, :, f:], keys, torch.cat([memory[1], v], 2), torch.cat([filled, triangle], 3))
    heads = torch.cat([model_module.attend(q[:, :, :f], own, v), heads], 2)
    rows = torch.cat([residual, x], 1) + self.self_attn.out(heads)
    rows = rows + self.mlp(self.post_attention_layernorm(rows))
    kept = [torch.cat([old[:, :, size:], new[:, :, f:]], 2) for old, new in zip(memory, (k, v), strict=True)]
    return rows[:, f:], rows[:, :f], (kept[0], kept[1])


@pytest.mark.parametrize("name", ["base", "mqa", "query_previous", "fam_fills_block"])
def test_point_1_one_attention_with_a_mask_equals_two(exact: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = build(corner(name))
    blocks = random_tokens(model.config, 5, batch=2)
    one, one_state = stream(model, blocks)
    monkeypatch.setattr(Layer, "forward", two_attentions_layer)
    two, two_state = stream(model, blocks)
    assert gap(two, one) < 1e-12
    assert all(gap(two_state[key], one_state[key]) < 1e-12 for key in two_state)


@pytest.mark.parametrize("name", ["base", "no_memory"])
def test_point_3_the_last_token_changes_the_next_fam_and_no_token_what_its_own_block_reads(name: str) -> None:
    model = build(corner(name))
    size = model.config.block_size
    for state in (fresh_state(model), running_state(model)):
        block = random_tokens(model.config, 1)[0]
        logits, new = model.step(block, state)
        for t in range(size):
            other = block.clone()
            other[0, t] = (other[0, t] + 1) % VOCAB
            other_logits, other_new = model.step(other, state)
            # Through FAM of its own block a token would reach the rows before it.
            assert torch.equal(other_logits[:, :t], logits[:, :t])
            assert gap(other_logits[:, t], logits[:, t]) > 1e-3
            for key in [key for key in new if "fam" in key]:
                assert (other_new[key] - new[key]).abs().amax(-1).min() > 1e-4, f"{key}: all F rows see token {t}"


def test_point_3_a_block_reads_the_fam_of_the_state_and_nothing_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, plain = build(BASE), [], Layer.forward

    def spy(self: Layer, x: Tensor, fam: Tensor, *rest: Any) -> Any:
        read.append(fam)
        return plain(self, x, fam, *rest)

    state = running_state(model)
    monkeypatch.setattr(Layer, "forward", spy)
    model.step(random_tokens(BASE, 1)[0], state)
    want = [state[f"past_fam_{i:02d}"].float() for i in range(BASE.num_hidden_layers)]
    assert all(torch.equal(a, b) for a, b in zip(read, want, strict=True))


@pytest.mark.parametrize("layer", range(3))
def test_point_4_fam_rows_ignore_the_cached_blocks(layer: int) -> None:
    model = build(corner("three_layers"))
    state, block = running_state(model), random_tokens(BASE, 1)[0]
    logits, new = model.step(block, state)
    for kind in ("key", "value"):
        name = f"past_{kind}_{layer:02d}"
        other_logits, other = model.step(block, {**state, name: state[name] + 1})
        assert gap(other_logits, logits) > 1e-3
        for i in range(3):
            # Memory of a layer reaches FAM of the layers above, through the token rows, but never its own.
            fam, other_fam = new[f"past_fam_{i:02d}"], other[f"past_fam_{i:02d}"]
            assert torch.equal(fam, other_fam) if i <= layer else gap(fam, other_fam) > 1e-5


def test_point_5_the_first_residual_is_zero() -> None:
    """Where attention and feed-forward add nothing, the residual is all that is left of FAM."""
    model = build(BASE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    rows, block = 3, random_tokens(BASE, 1, batch=3)[0]
    state = {name: torch.ones_like(value) for name, value in fresh_state(model, rows).items()}
    state["past_count"] = torch.tensor([0, 1, 2])
    _, new = model.step(block, state)
    for i in range(BASE.num_hidden_layers):
        fam = new[f"past_fam_{i:02d}"]
        assert torch.equal(fam[0], torch.zeros_like(fam[0]))
        assert torch.equal(fam[1:], torch.ones_like(fam[1:]))


@pytest.mark.parametrize("name", ["base", "three_layers", "mqa", "qk_norm", "llama3", "fam_fills_block", "one_fam"])
def test_point_5_f0_comes_from_the_prompt_embeddings(exact: None, name: str) -> None:
    config = corner(name)
    model, block = build(config), random_tokens(config, 1)[0]
    got, want = model.initial_fam(), initial_fam(config, weights_of(model), 0)
    assert torch.equal(got[0], model.model.fam_embeddings.weight)
    assert gap(got, np.stack(want)) < EXACT
    logits, new = model.step(block, fresh_state(model))
    model.model.fam_embeddings.weight[0] *= -1
    other_logits, other = model.step(block, fresh_state(model))
    assert gap(logits, other_logits) > 1e-3
    assert all(gap(new[key], other[key]) > 1e-3 for key in new if "fam" in key)


@pytest.mark.parametrize("name", ["base", "no_fam", "no_memory", "no_fam_no_memory", "one_segment", "query_previous"])
def test_point_6_streaming_equals_the_whole_sequence_at_once(exact: None, name: str) -> None:
    """One pass per layer where F = 0; the fixed point of such passes where F > 0 (see ``whole_sequence``)."""
    config = corner(name)
    model, blocks = build(config), random_tokens(config, 6)
    logits = stream(model, blocks)[0][:, 0].reshape(-1, VOCAB)
    assert gap(logits, whole_sequence(config, weights_of(model), blocks.reshape(-1).numpy())) < EXACT


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_point_7_enough_memory_without_fam_is_causal_attention(exact: None, kv_heads: int) -> None:
    blocks = random_tokens(BASE, 6)
    config = replace(BASE, fam_length=0, memory_segments=5, num_key_value_heads=kv_heads)
    model = build(config)
    logits = stream(model, blocks)[0][:, 0].reshape(-1, VOCAB)
    # One block as long as the sequence: its mask is the plain lower triangle.
    plain = replace(config, block_size=24, memory_segments=0)
    tokens = blocks.reshape(1, -1)
    assert gap(logits, whole_sequence(plain, weights_of(model), tokens[0].numpy())) < EXACT
    one_block = build(plain)
    assert gap(logits, one_block.step(tokens, fresh_state(one_block))[0][0]) < EXACT
    short = build(replace(config, memory_segments=4))
    assert gap(logits, stream(short, blocks)[0][:, 0].reshape(-1, VOCAB)) > 1e-4  # 4 segments are one too few


@pytest.mark.parametrize("name", ["base", "no_fam", "no_memory"])
def test_point_8_the_same_state_and_block_give_the_same_bits_at_any_time(name: str) -> None:
    model = build(corner(name), dtype=torch.float32)
    state, block = running_state(model, blocks=5), random_tokens(model.config, 1)[0]
    logits, new = model.step(block, state)
    later = state
    for index in range(300):  # a counter inside the model would have moved
        later = model.step(random_tokens(model.config, 1, seed=index)[0], later)[1]
        assert later["past_count"].tolist() == [max(model.config.memory_segments, 1)]
    again, again_new = model.step(block, state)
    assert torch.equal(logits, again)
    assert same(new, again_new)


@pytest.mark.parametrize("origin", [5_000, 5_000_000])
@pytest.mark.parametrize("name", ["base", "query_previous", "llama3"])
def test_point_8_absolute_positions_shifted_by_thousands_of_blocks_change_nothing(
    exact: None, name: str, origin: int
) -> None:
    config = corner(name)
    model, blocks = build(config), random_tokens(config, 5)
    far = LiteralStream(config, weights_of(model), origin * config.block_size)
    for logits, block in zip(stream(model, blocks)[0], blocks, strict=True):
        # The literal form loses digits to the large angles (about 1e-16 * 2e7 radians); the model does not.
        assert gap(logits[0], far.block(block[0].numpy())) < 1e-7


@pytest.mark.parametrize("blocks_between", [1, 12, 40])
def test_point_9_with_fam_the_first_token_changes_logits_many_blocks_later(blocks_between: int) -> None:
    model = build(corner("no_memory"))
    blocks = random_tokens(model.config, blocks_between + 1)
    other = blocks.clone()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % VOCAB
    assert gap(stream(model, blocks)[0][-1], stream(model, other)[0][-1]) > 1e-3


@pytest.mark.parametrize(("layers", "segments"), [(1, 1), (2, 2), (3, 1), (2, 0)])
def test_point_9_without_fam_nothing_reaches_beyond_layers_times_segments(layers: int, segments: int) -> None:
    config = replace(BASE, fam_length=0, num_hidden_layers=layers, memory_segments=segments)
    model, reach = build(config), layers * segments
    blocks = random_tokens(config, reach + 4)
    other = blocks.clone()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % VOCAB
    logits, other_logits = stream(model, blocks)[0], stream(model, other)[0]
    for index in range(reach + 1):
        assert gap(logits[index], other_logits[index]) > 1e-8, f"block {index} is within reach"
    assert torch.equal(logits[reach + 1 :], other_logits[reach + 1 :])


def test_point_9_without_fam_a_stream_is_its_last_blocks() -> None:
    """The same blocks after a long past and as a stream of their own: not even the start of the stream matters."""
    model = build(corner("no_fam"))
    blocks = random_tokens(BASE, 20)
    reach = BASE.num_hidden_layers * BASE.memory_segments
    assert torch.equal(stream(model, blocks)[0][-1], stream(model, blocks[-reach - 1 :])[0][-1])
    assert not torch.equal(stream(model, blocks)[0][-1], stream(model, blocks[-reach:])[0][-1])


# The state


@pytest.mark.parametrize("name", ["base", "no_fam", "no_memory", "no_fam_no_memory", "more_segments_than_blocks"])
def test_an_all_zero_row_is_a_fresh_stream_beside_others(name: str) -> None:
    model = build(corner(name), dtype=torch.float32)
    blocks = random_tokens(model.config, 4, batch=3)
    want, want_state = stream(model, blocks)
    state = running_state(model, batch=3)
    for tensor in state.values():
        tensor[1] = 0
    got, got_state = stream(model, blocks, state)
    assert torch.equal(got[:, 1], want[:, 1])
    assert all(torch.equal(got_state[key][1], want_state[key][1]) for key in want_state)
    if model.config.fam_length or model.config.memory_segments:
        assert gap(got[:, 0], want[:, 0]) > 1e-3  # the others did not start again


@pytest.mark.parametrize("garbage", [-3e4, 1e20])
@pytest.mark.parametrize("name", ["base", "one_segment", "more_segments_than_blocks", "mqa", "no_memory"])
def test_garbage_where_the_count_says_empty_changes_nothing(name: str, garbage: float) -> None:
    model = build(corner(name), dtype=torch.float32)
    size, segments = model.config.block_size, model.config.memory_segments
    block = random_tokens(model.config, 1, batch=4)[0]
    for seen in range(segments + 1):
        state = running_state(model, seen, batch=4) if seen else fresh_state(model, 4)
        spoilt = {name: value.clone() for name, value in state.items()}
        empty = (segments - seen) * size
        for key, value in spoilt.items():
            if key.startswith(("past_key", "past_value")):
                value[:, :, :empty] = garbage
            elif key.startswith("past_fam") and seen == 0:
                value[:] = garbage
        logits, new = model.step(block, state)
        spoilt_logits, spoilt_new = model.step(block, spoilt)
        assert torch.equal(logits, spoilt_logits)
        for key in new:
            kept = slice(max(empty - size, 0), None) if key.startswith(("past_key", "past_value")) else slice(None)
            axis = 2 if new[key].dim() == 4 else 0
            index = (slice(None),) * axis + (kept,)
            assert torch.equal(new[key][index], spoilt_new[key][index]), key


def test_a_long_empty_memory_is_no_memory() -> None:
    """Attention kernels go through keys in tiles; here several whole tiles are masked."""
    config = replace(BASE, block_size=300, memory_segments=5)
    model, plain = (build(replace(config, memory_segments=m), dtype=torch.float32) for m in (5, 0))
    block = random_tokens(config, 1)[0]
    logits, new = model.step(block, fresh_state(model))
    plain_logits, plain_new = plain.step(block, fresh_state(plain))
    assert gap(logits, plain_logits) < 1e-5 * float(plain_logits.abs().max())
    assert all(gap(new[key], value) < 1e-4 for key, value in plain_new.items() if "fam" in key)


def test_a_step_leaves_its_inputs_alone() -> None:
    model = build(BASE)
    state = running_state(model, batch=2)
    before = {name: value.clone() for name, value in state.items()}
    new = model.step(random_tokens(BASE, 1, batch=2)[0], state)[1]
    for value in new.values():
        value.fill_(9)  # also not by way of storage that input and output share
    assert same(state, before)


@pytest.mark.parametrize("name", ["base", "no_fam_no_memory"])
def test_last_logits_are_the_last_row_of_all(name: str) -> None:
    model = build(corner(name))
    state, block = running_state(model, batch=2), random_tokens(model.config, 1, batch=2)[0]
    (every, new), (last, last_new) = (model.step(block, state, logits=which) for which in ("all", "last"))
    assert last.shape == (2, 1, VOCAB)
    assert gap(last, every[:, -1:]) < 1e-12  # a product of another height may round differently
    assert same(new, last_new)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_state_dtypes_keep_to_the_contract_in_half_precision(precision: str, dtype: torch.dtype) -> None:
    model = build(BASE, dtype=dtype)
    specs = model.contract(precision, batch=2).states
    state = {spec.name: torch.zeros(spec.sized(2), dtype=getattr(torch, spec.dtype)) for spec in specs}
    blocks = random_tokens(BASE, 4, batch=2)
    logits, state = stream(model, blocks, state)
    assert logits.dtype == torch.float32
    for spec in specs:
        assert (state[spec.name].dtype, tuple(state[spec.name].shape)) == (getattr(torch, spec.dtype), spec.sized(2))
    fam = state["past_fam_00"]
    assert fam.dtype == torch.float32
    assert gap(fam, fam.to(dtype).float()) > 0  # it holds more than half precision can
    want = stream(build(BASE, dtype=torch.float32), blocks)[0]
    assert gap(logits, want) < (0.06 if dtype == torch.bfloat16 else 0.006) * float(want.abs().max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fam_state_can_be_kept_in_half_precision(dtype: str) -> None:
    config = replace(BASE, fam_state_dtype=dtype)
    model = build(config, dtype=torch.float32)
    state = {s.name: torch.zeros(s.sized(1), dtype=getattr(torch, s.dtype)) for s in model.contract().states}
    _, new = model.step(random_tokens(config, 1)[0], state)
    _, full = model.step(random_tokens(config, 1)[0], fresh_state(model))
    assert torch.equal(new["past_fam_01"], full["past_fam_01"].to(getattr(torch, dtype)))


# F_0 as a constant, and training


@pytest.mark.parametrize("name", ["base", "no_memory", "no_fam"])
def test_folded_f0_equals_computed_f0(name: str) -> None:
    model = build(corner(name), dtype=torch.float32)
    blocks = random_tokens(model.config, 3, batch=2)
    logits, state = stream(model, blocks)
    names = list(model.state_dict())
    model.fold_fam()
    folded, folded_state = stream(model, blocks)
    assert torch.equal(logits, folded)
    assert same(state, folded_state)
    assert list(model.state_dict()) == names  # the constant is no weight of the checkpoint


def test_gradient_reaches_the_prompt_embeddings_unless_folded(exact: None) -> None:
    model = build(corner("no_memory")).requires_grad_()
    prompt, blocks = model.model.fam_embeddings.weight, random_tokens(model.config, 3)

    def gradient(index: int) -> Tensor | None:
        prompt.grad = None
        stream(model, blocks)[0][index].square().sum().backward()
        return prompt.grad

    for index in (0, 2):  # directly, and through two updates of FAM
        grad = gradient(index)
        assert grad is not None
        assert grad.abs().amax(-1).min() > 1e-3
        direction = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0)).double()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                prompt += sign * 1e-5 * direction
                values.append(stream(model, blocks)[0][index].square().sum())
                prompt -= sign * 1e-5 * direction
        slope = float(values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-5)
    model.fold_fam()
    assert gradient(2) is None


def test_gradient_flows_through_fam_to_the_tokens_of_earlier_blocks() -> None:
    model = build(corner("no_memory"))
    first = model.model.embed_tokens(random_tokens(BASE, 1)[0]).requires_grad_()
    _, state = model.step(first, fresh_state(model))
    for seed in range(3):
        logits, state = model.step(random_tokens(BASE, 1, seed=seed)[0], state)
    logits.square().sum().backward()
    assert first.grad is not None
    assert first.grad.abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", CORNERS)
def test_the_config_counts_the_weights(name: str) -> None:
    assert corner(name).parameters == sum(p.numel() for p in FamModel(corner(name)).parameters())


# These tests can fail: wrong models, and what the comparison with the literal makes of them


def of_fam_rows(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """A wrong mask for FAM's rows: ``change`` is given what they see, [b, 1, F, F+M*T+T]."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        plain, f = FamModel._mask, BASE.fam_length

        def mask(self: FamModel, count: Tensor) -> Tensor:
            right = plain(self, count)
            return torch.cat([change(right[:, :, :f]), right[:, :, f:]], 2)

        patch.setattr(FamModel, "_mask", mask)

    return sabotage


def first_residual_is_kept(patch: pytest.MonkeyPatch) -> None:
    plain = Layer.forward
    patch.setattr(Layer, "forward", lambda self, x, fam, residual, *rest: plain(self, x, fam, fam, *rest))


def feed_forward_skips_fam(patch: pytest.MonkeyPatch) -> None:
    plain, size = model_module.FeedForward.forward, BASE.block_size

    def forward(self: Any, x: Tensor) -> Tensor:
        y = plain(self, x)
        return torch.cat([0 * y[:, :-size], y[:, -size:]], 1) if x.shape[1] > size else y

    patch.setattr(model_module.FeedForward, "forward", forward)


def off_by_one(table: str, rows: slice) -> Callable[[pytest.MonkeyPatch], None]:
    def sabotage(patch: pytest.MonkeyPatch) -> None:
        plain = rotary_module.rotary_tables

        def tables(config: FamConfig) -> dict[str, tuple[Tensor, Tensor]]:
            found, step = plain(config), rotary_module.inverse_frequencies(config)
            cos, sin = (part.clone() for part in found[table])
            a, b = cos[rows].clone(), sin[rows].clone()
            cos[rows], sin[rows] = a * step.cos() - b * step.sin(), b * step.cos() + a * step.sin()
            return found | {table: (cos, sin)}

        patch.setattr(rotary_module, "rotary_tables", tables)

    return sabotage


SABOTAGE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "fam_sees_past_blocks": of_fam_rows(torch.ones_like),
    "fam_is_causal": of_fam_rows(lambda seen: seen & seen.new_ones(seen.shape).tril(seen.shape[-1] - seen.shape[-2])),
    "first_residual_is_kept": first_residual_is_kept,
    "feed_forward_skips_fam": feed_forward_skips_fam,
    "memory_keys_off_by_one": off_by_one("column", slice(BASE.fam_length, -BASE.block_size)),
    "fam_keys_off_by_one": off_by_one("column", slice(BASE.fam_length)),
    "fam_queries_off_by_one": off_by_one("query", slice(BASE.fam_length)),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_caught(exact: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def difference() -> float:
        model, blocks = build(BASE), random_tokens(BASE, 4)
        literal = LiteralStream(BASE, weights_of(model))
        return gap(stream(model, blocks)[0][:, 0], [literal.block(block[0].numpy()) for block in blocks])

    assert difference() < EXACT
    SABOTAGE[name](monkeypatch)
    assert difference() > 1e-3
