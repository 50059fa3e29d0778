"""Which part of the transformer a parameter belongs to: the embedding, a layer, or the unembedding and its norm."""


def part_names(n_layer: int) -> tuple[str, ...]:
    """From the input to the output."""
    return ("embedding", *(f"layer {k}" for k in range(1, n_layer + 1)), "unembedding")


def part_of(path: str) -> str:
    """The part of a parameter by its path, in which layers are numbered: `layers/qkv/dense/kernel/0`."""
    if is_stacked(path):
        return f"layer {int(path.rpartition('/')[2]) + 1}"
    return "embedding" if path in ("embedding", "position") else "unembedding"


def is_stacked(path: str) -> bool:
    """Whether a parameter's leading axis is one of layers."""
    return path.startswith("layers/")
