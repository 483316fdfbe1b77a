"""What stands between a grid and its runs."""

import jax
import jax.numpy as jnp

from hippocampus.probing.ablation.cells import compiled_once


def test_what_one_seed_compiled_the_next_one_reads(tmp_path):
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    assert jax.config.jax_compilation_cache_dir is None

    def train_step():
        """A function of its own that compiles to the same and takes its time to."""
        def step(x):
            for _ in range(150):
                x = jnp.tanh(x @ x) + jnp.linalg.norm(x)
            return x
        return jax.jit(step)

    for folder in (tmp_path / "compiled", tmp_path / "of another ablation"):
        with compiled_once(folder):
            events.clear()
            first = train_step()(jnp.eye(3))
            assert not any("cache_hits" in name for name in events)
            assert any(folder.rglob("*-cache"))
            second = train_step()(jnp.eye(3))
            assert any("cache_hits" in name for name in events)
        assert (first == second).all()
        assert not folder.exists()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_somebody_has_chosen_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    try:
        with compiled_once(tmp_path / "compiled"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
