import jax
import jax.numpy as jnp

from scaling_jax.tasks import ModelConfig, Transformer, is_stacked, part_names, part_of


def test_every_parameter_is_in_one_part_and_every_part_has_some():
    model = ModelConfig(n_layer=3, d_model=16, n_head=1)
    params = jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = range(x.shape[0]) if is_stacked(name) else ()
        for each in [f"{name}/{k}" for k in layers] or [name]:
            found.setdefault(part_of(each), set()).add(name.split("/")[0])
    assert set(found) == set(part_names(3))
    assert found["embedding"] == {"embedding", "position"}
    assert found["unembedding"] == {"norm", "unembedding"}
