import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from scaling_jax.compile.ahead_of_time import Collective, collectives
from scaling_jax.parallel import AXIS, data_mesh

HLO = """
  %add.1 = f32[8]{0} add(%a, %b)
  %all-reduce.2 = (f32[257,64]{1,0:T(8,128)S(1)}, f32[]{:T(128)}, /*index=5*/bf16[2,3]{1,0}) all-reduce(%x, %y)
  %get-tuple-element.7 = f32[257,64]{1,0:T(8,128)S(1)} get-tuple-element(%all-reduce.2), index=0
  %all-gather-start = (f32[4]{0}, f32[16]{0}) all-gather-start(%z), dimensions={0}
  %all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)
  ROOT %collective-permute.1 = pred[10]{0} collective-permute(%w), source_target_pairs={{0,1}}
"""


def test_each_operation_counts_once_with_the_bytes_of_its_result():
    assert collectives(HLO) == [
        Collective("all-reduce", 4 * (257 * 64 + 1) + 2 * 6),
        Collective("all-gather", 4 * 16),
        Collective("collective-permute", 10),
    ]


@pytest.mark.parametrize("num_means", [0, 1, 2])
def test_a_compiled_programs_operations_are_found(num_means):
    def body(x):
        for _ in range(num_means):
            x = jnp.sin(jax.lax.pmean(x, AXIS))
        return x

    mesh = data_mesh(jax.devices())
    mapped = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    hlo = jax.jit(mapped).lower(jnp.zeros((3, 5))).compile().as_text()
    assert collectives(hlo) == [Collective("all-reduce", 3 * 5 * 4)] * num_means
