"""Compiled programs kept between processes."""

import jax

from scaling_jax.data import cache_folder


def keep_compiled_programs() -> None:
    """From now on, a program that any process of this user compiled before is not compiled again.

    They are kept where JAX was told to (JAX_COMPILATION_CACHE_DIR), else in the package's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
