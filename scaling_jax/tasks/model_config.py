"""Model configurations by name: layers × width, from laptop sizes to Kaplan et al.'s 3M and 85M."""

import dataclasses
from typing import Literal

from scaling_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer as in Kaplan et al. 2020 (arXiv 2001.08361, §2.1 and table 1)."""

    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int = 257
    context: int = 64  # tokens
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters, softmax and loss are always float32
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # cuDNN's where a GPU computes in bfloat16

    def __post_init__(self):
        for field in ("n_layer", "d_model", "n_head", "vocab_size", "context"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)} must be positive")
        if self.d_model % self.n_head:
            raise UserError(f"d_model = {self.d_model} doesn't split into n_head = {self.n_head} heads")
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise UserError(
                'attention="cudnn" works in bfloat16 only: set compute_dtype="bfloat16", or attention="auto"'
            )

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.d_model}"

    @property
    def num_params(self) -> int:
        """N, the non-embedding parameters: 12·n_layer·d_model² (Kaplan et al. 2020, eq. 2.1)."""
        return 12 * self.n_layer * self.d_model**2


# (n_layer, d_model, n_head); heads of 32 … 64 wide
_SIZES = [
    (1, 16, 1),
    (1, 32, 1),
    (2, 32, 1),
    (2, 48, 2),
    (2, 64, 2),
    (4, 128, 4),
    (4, 256, 4),  # 3M
    (6, 384, 6),  # 11M
    (8, 512, 8),  # 25M
    (12, 768, 12),  # 85M
]
MODELS = {config.name: config for config in (ModelConfig(*size) for size in _SIZES)}


def model_config(name: str, **changes) -> ModelConfig:
    """A size of the table, with changes such as `context` or `vocab_size`.

    Raises:
      UserError: if the table has no such size.
    """
    if name not in MODELS:
        raise UserError(f"unknown model size {name!r}: choose from {', '.join(MODELS)}")
    return dataclasses.replace(MODELS[name], **changes)
