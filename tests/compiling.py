"""Options with which XLA compiles in a hurry: tests compile for longer than they compute.

By what this jaxlib knows: an unknown name in XLA_FLAGS ends the process, and an unknown compiler option raises.
"""

from importlib.metadata import version

# Emitters of fused loops: the older ones compile a third faster, and are gone since jaxlib 0.11.1.
_HAS_TWO_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1)
_EMITTERS = "xla_cpu_use_fusion_emitters"

IN_A_HURRY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _HAS_TWO_EMITTERS:
    IN_A_HURRY += f" --{_EMITTERS}=false"

# For jit, which overrides what changes results: compiled as users' programs are.
AS_USERS = {_EMITTERS: True} if _HAS_TWO_EMITTERS else {"xla_backend_optimization_level": 3}
