"""Model configuration: the symbols of the FAM specification as one frozen dataclass, and the named presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from famexport.errors import ConfigError, UsageError, raise_problems

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "fam")  # "fam": options that no base family has
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MAX_LAYERS = 100  # state names carry two digits, so that sorted order is layer order
# No weight has these sizes, so no file need be large to claim them. The paper's are 1,024 and 3,072.
MAX_BLOCK_SIZE, MAX_MEMORY = 2**16, 2**20  # tokens of a block, and of all memory segments


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent rope scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class FamConfig:
    """A FAM model. Sizes are counts; ``block_size`` T and ``fam_length`` F are in tokens and vectors.

    ``memory_segments=0`` drops cached blocks, ``fam_length=0`` is Block Sliding Window Attention.

    Raises:
        ConfigError: names every field that is out of range, at once.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    block_size: int
    memory_segments: int
    fam_length: int
    fam_query_position: str = "current"
    fam_state_dtype: str = "float32"
    model_type: str = "llama"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        raise_problems(ConfigError, "model configuration", self._problems())

    def _problems(self) -> list[str]:
        found = []
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim block_size"
        )
        for name in positive.split():
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                found.append(f"{name} must be a positive integer, got {getattr(self, name)!r:.80}")
        for name in ("memory_segments", "fam_length"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                found.append(f"{name} must be an integer of 0 or more, got {getattr(self, name)!r:.80}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                found.append(f"{name} must be a positive number, got {value!r:.80}")
        choices = {
            "fam_query_position": ("current", "previous"),
            "fam_state_dtype": ("float32", "float16", "bfloat16"),
            "model_type": MODEL_TYPES,
            "norm": ("rmsnorm", "layernorm"),
            "activation": ACTIVATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r:.80}")
        for name in ["gated_mlp", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"]:
            if not isinstance(getattr(self, name), bool):  # the text "false" would count as true
                found.append(f"{name} must be true or false, got {getattr(self, name)!r:.80}")
        if found:
            return found  # the rules below need sound fields
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            found.append(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.fam_length > self.block_size:
            found.append(
                f"fam_length ({self.fam_length}) must not exceed block_size ({self.block_size}): "
                "FAM takes the last positions of the block it compressed"
            )
        if self.block_size > MAX_BLOCK_SIZE:
            found.append(f"block_size must be at most {MAX_BLOCK_SIZE}, got {self.block_size}")
        if self.memory_segments * self.block_size > MAX_MEMORY:
            found.append(
                f"memory_segments ({self.memory_segments}) of block_size ({self.block_size}) must hold at most "
                f"{MAX_MEMORY} tokens"
            )
        if self.num_hidden_layers > MAX_LAYERS:
            found.append(f"num_hidden_layers must be at most {MAX_LAYERS}, got {self.num_hidden_layers}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FamConfig:
        """The configuration in ``data``, as ``to_dict`` wrote it. Unknown keys are refused."""
        known = {f.name for f in fields(cls)}
        problems = [f"unknown key {key!r:.80}" for key in data if key not in known]
        scaling = data.get("rope_scaling")
        if scaling is not None and (not isinstance(scaling, dict) or set(scaling) != _SCALING_KEYS):
            problems.append(f"rope_scaling must have the keys {sorted(_SCALING_KEYS)}, got {scaling!r:.80}")
        raise_problems(ConfigError, "model configuration", problems)
        try:
            return cls(**{**data, "rope_scaling": Llama3Scaling(**scaling) if scaling else None})
        except TypeError as exc:
            raise ConfigError(f"model configuration: {exc}") from exc

    @property
    def parameters(self) -> int:
        """Number of weights, prompt embeddings included."""
        c = self
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        per_norm = c.hidden_size * (2 if c.norm == "layernorm" else 1)
        layer = c.hidden_size * (2 * q + 2 * kv) + c.hidden_size * c.intermediate_size * (3 if c.gated_mlp else 2)
        layer += (q + 2 * kv) * c.qkv_bias + c.hidden_size * c.out_bias + 2 * per_norm
        layer += 2 * c.head_dim * c.qk_norm * (2 if c.norm == "layernorm" else 1)
        layer += (c.intermediate_size * (2 if c.gated_mlp else 1) + c.hidden_size) * c.mlp_bias
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return c.num_hidden_layers * layer + tables + per_norm + c.fam_length * c.hidden_size

    def block_flops(self, batch: int = 1, logits: str = "all") -> int:
        """Floating-point operations that one block step needs (2 per multiply-add), products and attention only: FAM's
        rows see no past block, although graphs compute those scores and hide them."""
        c = self
        t, f, m = c.block_size, c.fam_length, c.memory_segments * c.block_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        weights = c.hidden_size * (2 * q + 2 * kv) + c.hidden_size * c.intermediate_size * (3 if c.gated_mlp else 2)
        attention = 2 * q * (t * (m + f + t) + f * (f + t))
        head = c.vocab_size * c.hidden_size * (t if logits == "all" else 1)
        return 2 * batch * (c.num_hidden_layers * (weights * (t + f) + attention) + head)


_SCALING_KEYS = {f.name for f in fields(Llama3Scaling)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _paper(layers: int, width: int, ff: int, heads: int, kv_heads: int) -> FamConfig:
    """The paper's models (section 4 and appendix A): block 1024, M = 3, F = 64."""
    return FamConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        block_size=1024,
        memory_segments=3,
        fam_length=64,
    )


PRESETS: dict[str, FamConfig] = {
    "tiny": FamConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        block_size=8,
        memory_segments=2,
        fam_length=4,
    ),
    "edge": FamConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        block_size=64,
        memory_segments=3,
        fam_length=16,
    ),
    "paper-1b": _paper(18, 1536, 12288, 12, 12),
    "paper-8b": _paper(32, 4096, 16384, 32, 32),
    "paper-24b": _paper(56, 4096, 32768, 32, 1),
}


def preset(name: str, **changes: Any) -> FamConfig:
    """The named preset, with fields changed.

    Raises:
        UsageError: no preset of that name.
        ConfigError: the changed fields do not fit together.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r:.80}; expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
