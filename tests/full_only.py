"""Cases of tests that run only with `--full`, because quicker ones hold most of what they hold.

A test that is slow as a whole has the mark `full` where it stands; here are tests with many cases,
and which of them run every time.
"""

import fnmatch

QUICK: dict[str, tuple[str, ...]] = {
    "models/test_hybrid_lm.py::test_a_model_reads_the_past_of_its_own_row_and_document_only": (
        "all paths, R=3*", "hopfield, both*", "attention, R=3*", "ssm + hopfield, diagonal*",
        "ssm + attention, R=1*", "three layers of their own*"),
    "layers/test_paths.py::test_a_path_reads_the_past_of_its_own_row_and_document_only": (
        "ssm", "ssm sequential*", "ssm diagonal, input scale", "gru", "ssm s6", "ssm ssd",
        "hopfield context, K=3*", "hopfield slots, K=3", "hopfield both, K=2*",
        "attention, two groups*", "attention without positions"),
    "layers/test_caches.py::test_a_path_read_in_chunks_gives_what_it_gives_at_once": (
        "ssm", "ssm, convolution longer*", "ssm diagonal*", "gru", "s6", "ssd*",
        "hopfield context, K=2*", "hopfield slots*", "hopfield both, K=3*",
        "attention, two groups*", "attention without positions"),
    "layers/test_caches.py::test_a_path_in_bfloat16_read_in_chunks_gives_what_it_gives_at_once": (
        "ssm", "hopfield", "attention"),
    "layers/test_paths.py::test_values_and_gradients_are_finite_at_the_extremes_of_decay_and_beta":
        ("ssm", "ssm ssd", "hopfield both, K=3"),
    "models/test_cache.py::test_a_model_read_in_chunks_gives_what_it_gives_at_once": (
        "all paths, R=3*", "ssm, R=1*", "attention, grouped*", "layers of their own*",
        "bfloat16*"),
    # A gradient is slower than the values, of which some more are checked.
    "models/test_hybrid_lm.py::test_no_gradient_of_a_model_reaches_the_future": (
        "all paths, R=3*", "ssm + hopfield, diagonal*", "three layers, first without ssm*"),
    "models/test_hybrid_lm.py::test_remat_and_scan_change_no_value_and_no_gradient": (
        "switch0", "switch2"),
    "layers/test_paths.py::test_no_gradient_of_a_path_reaches_the_future": (
        "ssm", "ssm s6", "ssm ssd", "hopfield both, K=2*", "attention, two groups*"),
    "layers/test_paths.py::test_depth_gates_sum_to_one_and_start_uniform": ("2",),
    "models/test_cache.py::test_every_experiment_read_in_chunks_gives_what_it_gives_at_once": (
        "quickstart",),
    "models/test_cache.py::test_rows_of_other_lengths_read_together_are_each_as_alone": (
        "all paths*", "attention*"),
    "models/test_cache.py::test_a_row_begun_anew_is_as_a_fresh_one_and_the_others_keep_every_bit": (
        "all paths*", "attention*"),
    "models/test_cache.py::test_a_cache_for_other_passes_runs_those_passes": ("1", "3"),
    "models/test_interventions.py::test_arrays_that_change_nothing_give_the_bits_of_the_plain_run":
        ("all paths", "scan"),
    "models/test_equilibrium_lm.py::"
    "test_a_token_reads_the_past_of_its_own_row_and_document_at_any_number_of_sweeps": (
        "cascade-broyden-*", "simultaneous-picard-*"),
    "models/test_buu.py::test_adapters_see_no_future_no_other_row_and_no_other_document": (
        "{'mix'*",),
    "models/test_buu.py::test_reading_in_chunks_gives_what_reading_at_once_gives": ("{}",),
    "models/test_chopt.py::test_rows_that_go_on_with_a_memory_are_one_long_row": (
        "{'select': 'surprise'*",),
    # One family with what all have, and the one with everything else.
    "models/test_buu.py::test_behind_a_closed_gate_adapters_change_no_bit_of_the_logits": (
        "llama", "gemma3n"),
    "models/test_chopt.py::test_a_fresh_memory_changes_no_logit": ("llama", "gemma3n"),
    "backbones/test_adapters.py::test_a_fresh_adapter_changes_no_logit": ("llama", "gemma3n"),
    # Kernels, interpreted.
    "ops/kernels/test_scans_hopper.py::test_the_scan_and_its_adjoint_are_those_of_the_recurrence": (
        "float32",),
    "ops/kernels/test_scans_hopper.py::"
    "test_the_gated_scan_and_all_its_gradients_are_those_of_the_recurrence": ("almost 1",),
    "ops/kernels/test_attention_tpu.py::test_values_and_gradients_are_those_of_xla": (
        "window in documents",),
    "ops/kernels/test_scan_tpu.py::test_states_and_gradients_are_those_of_the_formula": ("shape0",),
    "ops/kernels/test_scan_tpu.py::test_gates_states_and_gradients_are_those_of_the_layer": (
        "shape0-float32",),
    "ops/kernels/test_decode_gpu.py::"
    "test_retrieve_is_attention_to_the_ring_and_writes_the_token_into_it": (
        "attention, grouped*", "retrieval, half steps*", "many rows*"),
    # Whole runs: one kind of damage, one of what is trained.
    "runs/test_damaged_runs.py::"
    "test_run_with_a_damaged_newest_step_goes_on_from_the_one_before_and_ends_with_the_same_bits": (
        "params*",),
    "training/test_chopt_run.py::test_what_is_trained_is_a_choice": ("full",),
    "training/test_chopt_run.py::test_a_score_does_not_depend_on_how_stories_are_cut_into_batches":
        ("192-2",),
    "training/test_losses.py::test_a_pass_that_learns_nothing_costs_no_backward_pass": ("full-2",),
    "training/test_step.py::test_one_token_and_one_id_train_without_what_is_not_finite": (
        "packed*",),
    "probing/test_report_in_browser.py::test_it_is_quiet_and_a_picture_of_it_is_kept": (
        "desktop-light", "phone-dark"),
}
"""From tests/, a test -> patterns of the cases that run every time."""


def parts(nodeid: str) -> tuple[str, str]:
    """(the test as in `QUICK`, its case) of what pytest calls a node."""
    test, _, case = nodeid.removeprefix("tests/").partition("[")
    return test, case[:-1]


def is_full_only(test: str, case: str) -> bool:
    """Whether a case waits for `--full`.

    Args:
      test: as in `QUICK`.
      case: its parameters, as pytest names them.
    """
    return test in QUICK and not any(fnmatch.fnmatchcase(case, one) for one in QUICK[test])
