"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from hippocampus.planning.plan import Plan

_GIB = 2**30


def describe(plan: Plan) -> str:
    """The plan as lines of `name  value`."""
    return "".join(f"{name:<23}{text}\n" for name, text in _lines(plan))


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    config, topology, mesh = plan.config, plan.topology, plan.mesh
    axes = " * ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    yield "topology", (f"{topology.name}: {topology.n_devices} x {topology.device.kind}, "
                       f"mesh {axes}")
    yield "parameters", (f"{plan.parameters:,} (vocabulary {config.model.vocab_size}; training "
                         "takes the tokenizer's)")
    yield "tokens per step", (f"{plan.tokens:,} = {config.train.batch_size} sequences of "
                              f"{config.data.context}")
    yield "settings", (f"{config.model.compute_dtype}, model.remat={config.model.remat}, "
                       f"model.scan_layers={str(config.model.scan_layers).lower()}, "
                       f"train.grad_accumulation={config.train.grad_accumulation}")
    yield from _memory(plan)
    yield "FLOPs per step", (f"{plan.flops:.3g} in all, {plan.flops / topology.n_devices:.3g} "
                             "per device (from the config: causal half, nothing twice)")
    if plan.step is None:
        yield "", ("no compiler for this device works without one: memory of activations and "
                   "bytes moved are not known")
    else:
        yield "", (f"XLA counts {plan.step.xla_flops:.3g} per device: loops once, custom calls not "
                   "at all, the whole square of scores, remat twice")
        yield from _traffic(plan)
    yield from _bound(plan)
    yield "made with", ", ".join(f"{name} {version}" for name, version in plan.versions.items())


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    has = plan.topology.chip.memory_bytes
    if plan.step is None:
        yield "memory per device", (f"{_gib(plan.state_bytes)} train state of {_gib(has)}; "
                                    "activations come on top")
        return
    memory = plan.step.memory
    verdict = "fits" if plan.fits else "does NOT fit"
    yield "memory per device", (f"{_gib(memory.total)} of {_gib(has)}: {verdict} "
                                f"({memory.total / has:.0%})")
    yield "  arguments", f"{_gib(memory.arguments)} (train state {_gib(plan.state_bytes)}, batch)"
    yield "  temporaries", f"{_gib(memory.temporaries)} (activations, gradients, buffers)"
    yield "  outputs", f"{_gib(memory.outputs)}, of which {_gib(memory.aliased)} reuse arguments"
    yield "  generated code", _gib(memory.code)
    yield "  largest batch", _batch_limit(plan)
    yield "compiled in", f"{plan.step.seconds:.0f} s"


def _batch_limit(plan: Plan) -> str:
    now, limit = plan.config.train.batch_size, plan.batch_limit or 0
    if limit > 8 * now:  # too far from what was compiled to give a number
        return f"more than 8 times the {now} sequences of this step"
    return f"about {limit} sequences per step (rough)"


def _traffic(plan: Plan) -> Iterator[tuple[str, str]]:
    assert plan.step is not None
    moved = plan.step.traffic
    yield "memory traffic", f"{_gib(moved.memory)} per device and step (estimate from the HLO)"
    used = [kind for kind, count in moved.count.items() if count]
    yield "collectives", (f"{_gib(sum(moved.sent.values()))} sent per device and step"
                          if used else "none")
    for kind in used:
        yield f"  {kind}", f"{_gib(moved.sent[kind])} in {moved.count[kind]}"
    if moved.unknown_loops:
        yield "", (f"{len(moved.unknown_loops)} loops of unknown length count once: "
                   f"{', '.join(moved.unknown_loops[:3])}")


def _bound(plan: Plan) -> Iterator[tuple[str, str]]:
    bound = plan.bound
    parts = {"compute": bound.compute, "memory": bound.memory, "links": bound.links}
    yield "roofline", ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in parts.items()
                                if value is not None) or "no figures for this device"
    if bound.seconds:
        at = f"{plan.mfu_bound:.0%} MFU" if plan.mfu_bound is not None else "MFU unknown"
        by = f"{bound.bound_by}, all that is known" if plan.step is None else bound.bound_by
        yield "bound, no measurement", (
            f"a step takes {bound.seconds * 1e3:.1f} ms or more ({by}), so at most "
            f"{plan.tokens / bound.seconds:,.0f} tokens/s at {at}")


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"
