"""The signatures that later parts of the project and other people's code call."""

import inspect

import pytest

from hippocampus.ops import (
    attention,
    cross_entropy,
    fixed_point,
    hopfield,
    jacobian,
    linear_scan,
    selective_scan,
)

FROZEN = {
    linear_scan.linear_scan:
        "(a_BTE, x_BTE, h0_BE=None, reset_BT=None, *, backend='associative')",
    attention.attention:
        "(q_BTHd, k_BTGd, v_BTGd, *, document_ids=None, window=0, scale=None, backend='xla')",
    cross_entropy.cross_entropy:
        "(hidden_BTD, head, targets_BT, weight_BT, *, smoothing=0.0, z_weight=0.0, "
        "backend='full')",
    cross_entropy.Head:
        "(weight_VD, bias_V=None, softcap=0.0, vocab_size=0, down_DE=None)",
    hopfield.retrieve:
        "(xi_BTHd, keys_BTHd, slots_SHd, beta_H, *, alpha=1.0, document_ids=None, "
        "backend='xla', scaled_BTHd=None)",
    selective_scan.selective_scan:
        "(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E=None, *, h0_BEN=None, reset_BT=None, "
        "backend='chunked')",
    selective_scan.ssd:
        "(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H=None, *, chunk=128, h0_BHPN=None, "
        "reset_BT=None, backend='chunked')",
    fixed_point.fixed_point:
        "(f, z0, args=(), *, method='anderson', max_iterations=30, tol=0.001, limit=None, "
        "damping=1.0, memory=5, regularization=1e-06, granularity='token', causal=True, "
        "document_ids=None, done=None, gradient='implicit', phantom_steps=1, "
        "backward_iterations=30, backward_tol=0.0001, remat=False, indexed=False, record=False, "
        "earliest=None)",
    fixed_point.Solution:
        "(value, converged, iterations, residual, residual_trace, evaluations, iterates)",
    jacobian.contraction: "(f, z, args, key, *, iterations=3)",
    jacobian.jacobian_norm: "(f, z, args, key)",
    hopfield.energy: "(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids=None)",
}


@pytest.mark.parametrize("function", FROZEN, ids=lambda function: function.__name__)
def test_the_signature_is_the_frozen_one(function):
    signature = inspect.signature(function)
    bare = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=signature.empty)
    assert str(bare) == FROZEN[function], (
        f"{function.__module__}.{function.__name__} is frozen: kernels, caches and adapters of "
        "later parts are written against it. Add a keyword with a default at the end if you must, "
        "and change this table with it")
