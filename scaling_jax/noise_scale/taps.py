"""Layers that give the squared gradient norm of every example, without keeping per-example gradients.

The model gets a parameter as `Tapped(value, probe)`; the probe is one zero per example. No output depends on the probe.
The backward pass sets the *cotangent* of the probe to the squared norm of each example's gradient of the value. With a
plain array instead of `Tapped`, a layer does the usual computation, so one model serves both (Goodfellow 2015, arXiv
1510.01799; Li et al. 2022, arXiv 2110.05679; Gray et al. 2024, arXiv 2411.00999).

Each use of a parameter adds the squared norm of its own gradient to the probe. If a parameter is used twice, the cross
term of both gradients is missing. `embed_tied` and `unembed_tied` add it for an embedding that is also the output head.
`check_taps` finds parameters whose norms are wrong.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scaling_jax.noise_scale.accumulate import explicit_mesh, left_to_xla, mark_varying, type_of, varying
from scaling_jax.noise_scale.norms import Tapped
from scaling_jax.noise_scale.norms import all_gather as all_gather  # one of the taps

MAX_ELEMENTS = 2**24  # of one layer's per-example gradients at a time; a larger batch is computed in chunks
MAX_ELEMENTS_ON_CPU = 2**20  # about what the caches hold
FLOP_PER_BYTE = 10  # operations in the time that memory moves one byte; an H100 has 20 in float32, CPU cores 5 to 10


def einsum(spec: str, x, w, out_sharding=None):
    """`jnp.einsum(spec, x, w)` of activations and a weight, for dense layers and attention projections.

    Args:
      spec: two operands and an output, without an ellipsis: "btd,dhk->bthk". The first letter of `x` and of the output
        stands for the example; `w` doesn't contain it.
      x: activations (B, …).
      w: array or `Tapped`.
      out_sharding: on a mesh with Explicit axes, where the result lies, as for `jnp.einsum`.

    Raises:
      ValueError: if the spec doesn't have this form.
    """
    dims = _parse(spec)
    if not isinstance(w, Tapped):
        return _product(dims, out_sharding, x, w)
    _check_probe(x, w)
    return _einsum(dims, out_sharding, x, w.value, w.probe)


def scale(x, w):
    """x * w for the scale of a LayerNorm or RMSNorm. `w`, an array or `Tapped`, has the shape of x's last axes."""
    return _tapped_elementwise(_scale, jnp.multiply, x, w)


def add(x, w):
    """x + w for biases and learned positions. `w`, an array or `Tapped`, has the shape of x's last axes."""
    return _tapped_elementwise(_add, jnp.add, x, w)


def embed(table, ids):
    """table[ids]. `table` is a (V, D) array or `Tapped`, `ids` are integers (B, …); the result is (B, …, D)."""
    if not isinstance(table, Tapped):
        return _rows(table, ids)
    _check_probe(ids, table)
    return _embed(table.value, ids, table.probe, None)[0]


def embed_tied(table, ids):
    """`embed` for a table that is also the output head: (activations, link). Pass the link to `unembed_tied`."""
    if not isinstance(table, Tapped):
        return _rows(table, ids), None
    _check_probe(ids, table)
    link = jnp.zeros_like(_rows(table.value, ids), jnp.float32)
    return _embed(table.value, ids, table.probe, link)


def unembed_tied(x, table, ids, link, out_sharding=None):
    """Logits (B, T, V) = x · tableᵀ, after `embed_tied(table, ids)` gave the link. x is (B, T, D), ids are (B, S)."""
    if not isinstance(table, Tapped):
        return _product(_HEAD, out_sharding, x, table)
    _check_probe(x, table)
    return _unembed_tied(out_sharding, x, table.value, ids, link, table.probe)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(dims, out_sharding, x, w, probe):
    return _product(dims, out_sharding, x, w)


def _product(dims, out_sharding, x, w):
    """The einsum, as a single matrix product where possible; XLA's CPU backend does that up to 4 times as fast."""
    x_dims, w_dims, y_dims = dims
    if explicit_mesh():
        return jnp.einsum(_spec(dims), x, w, out_sharding=out_sharding)
    leading = sum(d not in w_dims for d in x_dims)
    as_matrix = x_dims[leading:] + y_dims[leading:]
    if x_dims[:leading] != y_dims[:leading] or sorted(w_dims) != sorted(as_matrix):
        return jnp.einsum(_spec(dims), x, w)
    w = w.transpose([w_dims.index(d) for d in as_matrix])
    contracted = len(x_dims) - leading
    y = x.reshape(prod(x.shape[:leading]), -1) @ w.reshape(prod(w.shape[:contracted]), -1)
    return y.reshape(x.shape[:leading] + w.shape[contracted:])


def _einsum_fwd(dims, out_sharding, x, w, probe):
    return _einsum(dims, out_sharding, x, w, probe), (x, w, probe)


def _einsum_bwd(dims, out_sharding, residuals, dy):
    x, w, probe = residuals
    _, pullback = jax.vjp(partial(_product, dims, out_sharding), x, w)
    dx, dw = pullback(dy)  # XLA leaves dw out if nothing uses it
    return dx, *left_to_xla(partial(_weight_grad, dims), x, w, dw, dy, like=(w, probe))


def _weight_grad(dims, x, w, dw, dy):
    """(gradient of w, squared norm of each example's gradient)."""
    if _gram_is_cheaper(dims, x, w):
        xx, dd = (_gram(z, z_dims, dims) for z, z_dims in ((x, dims[0]), (dy, dims[2])))
        return dw, jnp.sum(xx * dd, axis=tuple(range(1, xx.ndim)))

    def of_chunk(xy):
        per_example = jax.vmap(lambda x, y: jnp.einsum(f"{dims[0][1:]},{dims[2][1:]}->{dims[1]}", x, y))(*xy)
        return per_example.sum(0), _sq_norms(per_example)

    def add(total, xy):
        dw, sq_norms = of_chunk(xy)
        return total + dw, sq_norms

    xy = _f32(x), _f32(dy)
    size = _chunk(len(x), w.size)
    if size == len(x):
        dw, sq_norms = of_chunk(xy)
    else:
        zeros = mark_varying(jnp.zeros(w.shape, jnp.float32), varying(x) | varying(dy))
        dw, sq_norms = jax.lax.scan(add, zeros, jax.tree.map(lambda z: z.reshape(-1, size, *z.shape[1:]), xy))
    return dw.astype(w.dtype), sq_norms.reshape(-1)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _chunk(num_examples, num_weights):
    """Number of examples whose gradients are computed at a time: the largest divisor of all examples that fits."""
    most = MAX_ELEMENTS_ON_CPU if jax.default_backend() == "cpu" else MAX_ELEMENTS
    return max(n for n in range(1, num_examples + 1) if num_examples % n == 0 and (n == 1 or n * num_weights <= most))


def _gram_is_cheaper(dims, x, w):
    """True if inner products between positions take less time than writing and twice reading per-example gradients.

    The operations that compute the per-example gradients aren't counted: the sum over examples needs them anyway.
    """
    x_dims, w_dims, y_dims = dims
    if set(x_dims) - set(w_dims + y_dims):
        return False
    size = dict(zip(x_dims + w_dims, x.shape + w.shape, strict=True))
    positions, d_in, d_out = (
        prod(size[d] for d in set(named) - set(others))
        for named, others in ((_positions(dims), ""), (x_dims, y_dims), (w_dims, x_dims))
    )
    return 2 * positions**2 * (d_in + d_out) <= FLOP_PER_BYTE * 12 * d_in * d_out


def _positions(dims):
    return [d for d in dims[2][1:] if d in dims[0] and d not in dims[1]]


def _shared(dims):
    return [d for d in dims[1] if d in dims[0] and d in dims[2]]


def _gram(z, z_dims, dims):
    """Inner products between the positions of each example: (B, positions, same positions again, shared letters)."""
    again = {d: d.upper() for d in _positions(dims)}
    other = "".join(again.get(d, d) for d in z_dims)
    out = "".join([z_dims[0], *again.keys(), *again.values(), *_shared(dims)])
    return jnp.einsum(f"{z_dims},{other}->{out}", _f32(z), _f32(z))


@jax.custom_vjp
def _scale(x, w, probe):
    return x * _expand(w, x)


def _scale_fwd(x, w, probe):
    return _scale(x, w, probe), (x, w, probe)


def _scale_bwd(residuals, dy):
    x, w, probe = residuals
    return dy * _expand(w, x), *left_to_xla(_sums, _f32(dy) * _f32(x), w, like=(w, probe))


def _sums(grads, w):
    """(gradient of w, squared norm of each example's gradient), from gradients at each position."""
    per_example = grads.sum(tuple(range(1, grads.ndim - w.ndim)))
    return per_example.sum(0).astype(w.dtype), _sq_norms(per_example)


_scale.defvjp(_scale_fwd, _scale_bwd)


@jax.custom_vjp
def _add(x, w, probe):
    return x + _expand(w, x)


def _add_fwd(x, w, probe):
    return _add(x, w, probe), (w, probe)


def _add_bwd(residuals, dy):
    w, probe = residuals
    return dy, *left_to_xla(_sums, _f32(dy), w, like=(w, probe))


_add.defvjp(_add_fwd, _add_bwd)


@jax.custom_vjp
def _embed(table, ids, probe, link):
    return _rows(table, ids), link


def _rows(table, ids):
    if not explicit_mesh():
        return table[ids]
    return table.at[ids].get(out_sharding=PartitionSpec(*type_of(ids).sharding.spec, None))


def _embed_fwd(table, ids, probe, link):
    return _embed(table, ids, probe, link), (table, ids, probe)


def _embed_bwd(residuals, cotangents):
    table, ids, probe = residuals
    dy, dlink = cotangents
    dtable, sq_norms = left_to_xla(_table_grad, table, ids, dy, dlink, like=(table, probe))
    return dtable, None, sq_norms, dlink


def _table_grad(table, ids, dy, dlink):
    _, pullback = jax.vjp(lambda table: table[ids], table)
    dy_BxTxD = _f32(dy).reshape(len(ids), -1, dy.shape[-1])
    sq_norms = jax.vmap(_sq_norm_by_id)(ids.reshape(len(ids), -1), dy_BxTxD)
    if dlink is not None:
        # |g_embed + g_head|² contains 2⟨g_embed, g_head⟩; dlink has the rows of g_head that were looked up.
        sq_norms += 2 * jnp.sum(dy_BxTxD * dlink.reshape(dy_BxTxD.shape), axis=(1, 2))
    return pullback(dy)[0], sq_norms


_embed.defvjp(_embed_fwd, _embed_bwd)


def _sq_norm_by_id(ids_T, dy_TxD):
    """|gradient of the table|² of one example. Rows with the same id are added before squaring."""
    _, segments = jnp.unique(ids_T, return_inverse=True, size=len(ids_T))
    return jnp.sum(jnp.square(jax.ops.segment_sum(dy_TxD, segments, len(ids_T))))


_HEAD = ("btd", "vd", "btv")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unembed_tied(out_sharding, x, table, ids, link, probe):
    return _product(_HEAD, out_sharding, x, table)


def _unembed_tied_fwd(out_sharding, x, table, ids, link, probe):
    return _unembed_tied(out_sharding, x, table, ids, link, probe), (x, table, ids, link, probe)


def _unembed_tied_bwd(out_sharding, residuals, dy):
    x, table, ids, link, probe = residuals
    dx, dtable, sq_norms = _einsum_bwd(_HEAD, out_sharding, (x, table, probe), dy)
    (rows,) = left_to_xla(_head_rows, x, ids, dy, like=(link,))
    return dx, dtable, None, rows, sq_norms


def _head_rows(x, ids, dy):
    """Those rows of each example's gradient of the head that were looked up in the table, where `embed_tied` did."""
    ids_BxS = ids.reshape(len(ids), -1)
    dy_BxTxS = jnp.take_along_axis(dy, ids_BxS[:, None, :], axis=2)
    rows_BxSxD = jnp.einsum("bts,btd->bsd", _f32(dy_BxTxS), _f32(x))
    return (rows_BxSxD.reshape(*ids.shape, -1),)


_unembed_tied.defvjp(_unembed_tied_fwd, _unembed_tied_bwd)


def _parse(spec):
    operands, arrow, y_dims = spec.replace(" ", "").partition("->")
    x_dims, _, w_dims = operands.partition(",")
    letters = x_dims + w_dims + y_dims
    if not (arrow and x_dims and w_dims and y_dims and letters.isalpha() and letters.islower()):
        raise ValueError(f"einsum {spec!r} must have two operands in lower-case letters and an output: 'btd,df->btf'")
    if x_dims[0] != y_dims[0] or x_dims[0] in w_dims:
        raise ValueError(
            f"einsum {spec!r}: x and the output must start with the example's letter, and w must not have it"
        )
    if any(len(set(dims)) < len(dims) for dims in (x_dims, w_dims, y_dims)) or set(w_dims) - set(x_dims + y_dims):
        raise ValueError(
            f"einsum {spec!r}: no letter may occur twice in a term, and every letter of w must be in x or the output"
        )
    return x_dims, w_dims, y_dims


def _spec(dims):
    return "{},{}->{}".format(*dims)


def _check_probe(x, w):
    if w.probe.shape != x.shape[:1]:
        raise ValueError(
            f"the probe has shape {w.probe.shape} for {x.shape[0]} examples: name parameters that the loss scans over "
            "in `stacked`, and make the example the first axis of activations"
        )


def _tapped_elementwise(tapped, plain, x, w):
    value = w.value if isinstance(w, Tapped) else w
    if x.shape[x.ndim - value.ndim :] != value.shape or x.ndim <= value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} must match the last axes of the activations, {x.shape}")
    if not isinstance(w, Tapped):
        return plain(x, _expand(w, x))
    _check_probe(x, w)
    return tapped(x, w.value, w.probe)


def _expand(w, x):
    return w.reshape((1,) * (x.ndim - w.ndim) + w.shape)


def _sq_norms(per_example):
    return jnp.sum(jnp.square(per_example), axis=tuple(range(1, per_example.ndim)))


def _f32(x):
    return x.astype(jnp.float32)
