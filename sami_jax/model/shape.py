"""The shape of a decoder."""

import dataclasses

from sami_jax.errors import BadDataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rotary frequencies for contexts longer than those of pretraining (`rope_type` "llama3").

    Attributes:
      factor: what the frequencies of the longest waves are divided by.
      low_freq_factor: waves longer than original_positions / low_freq_factor are divided by `factor`.
      high_freq_factor: waves shorter than original_positions / high_freq_factor stay; between the two it is a blend.
      original_positions: longest sequence of pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama, Mistral or Mixtral family.

    Attributes:
      model_type: "llama", "mistral" or "mixtral", as config.json says it.
      vocab_size: V.
      embed_dim: D.
      n_layers: L.
      n_heads: N.
      n_kv_heads: K; N is a multiple of it.
      head_dim: H.
      mlp_dim: F; with experts, of each.
      n_experts: E, or None for one dense MLP.
      experts_per_token: experts that a token is sent to, or None.
      max_positions: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, or None.
      norm_eps: added to the mean square in RMSNorm.
      sliding_window: tokens a query sees, itself included; None for all.
      tied_embeddings: the output head is the embedding.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_dim: int
    n_experts: int | None
    experts_per_token: int | None
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    sliding_window: int | None
    tied_embeddings: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and value <= 0:
                raise BadDataError(f"The model's {field.name} is {value}; it must be positive.")
        if self.n_heads % self.n_kv_heads:
            raise BadDataError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly.")
        if self.head_dim % 2:
            raise BadDataError(f"head_dim is {self.head_dim}, but rotary positions need an even one.")
        if (self.n_experts or 0) < (self.experts_per_token or 0):
            raise BadDataError(f"A token cannot be sent to {self.experts_per_token} of {self.n_experts} experts.")
