"""Files of tests that take longest: they are begun first, so that no core waits for one at the end.

Only the order hangs on this list: what is missing costs some waiting, nothing else.
"""

FILES = (
    "models/test_hybrid_lm.py", "layers/test_paths.py", "models/test_cache.py",
    "training/test_sharding.py", "training/test_step.py", "models/test_chopt.py",
    "training/test_loop.py", "generation/test_language_model.py", "layers/test_caches.py",
    "models/test_equilibrium_lm.py", "training/test_rollback.py", "models/test_interventions.py",
    "distributed/test_processes.py", "probing/ablation/test_study.py", "training/test_kill.py",
    "serving/test_tool_loop.py", "serving/test_tools.py", "ops/test_sequence_shards.py",
    "training/test_signals.py", "training/test_guard.py",
    "training/test_kept_step.py", "models/test_taps.py", "training/test_soak.py",
    "training/test_equilibrium_run.py", "test_readme.py", "ops/test_cross_entropy.py")
"""From tests/, about longest first."""
